"""A test mode in which each block of KV cache that was pulled is compared with what the prefill engine had there.

The environment variable `TKNP_KV_CHECKSUMS=1` on both engines switches it on. When a lease begins, a prefill worker
then writes a sum for each block and KV head, over all layers of the block's group, into memory that readers can read.
It costs a pass over the KV cache on both sides."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

VARIABLE = "TKNP_KV_CHECKSUMS"
_MAX_HEADS = 256
SMALLEST_BLOCK = 16
"""Tokens."""
_READ_SECONDS = 5.0


def is_on() -> bool:
    return os.environ.get(VARIABLE) == "1"


def block_sums(caches: Sequence[torch.Tensor], block_ids: Sequence[int], block_size: int) -> np.ndarray[Any, Any]:
    """The sums of blocks of `block_size` tokens.

    Args:
        caches: one layer's each, [num_blocks, num_kv_heads, tokens in a block, elements of a key and a value], laid out
            so in memory; `tokens in a block` is a multiple of `block_size`, and block ids count the smaller blocks.

    Returns:
        [len(block_ids), num_kv_heads], int64.
    """
    total: Any = 0
    for layer, cache in enumerate(caches):
        num_blocks, num_heads, num_tokens, num_elements = cache.shape
        ratio = num_tokens // block_size
        # As the bytes arrive: whole blocks of the other side's size, one after the other.
        pages = cache.view(num_blocks * ratio, num_heads, block_size * num_elements)
        values = pages[torch.tensor(block_ids, device=cache.device)].view(torch.int16).to(torch.int64)
        weights = torch.arange(1, 2 * values.shape[-1], 2, device=cache.device)
        total = total + (2 * layer + 1) * (values * weights).sum(-1)
    return np.ascontiguousarray(total.cpu().numpy())


class ChecksumTable:
    """A prefill worker's sums: `rows[block, head]`."""

    def __init__(self, groups: Sequence[Sequence[torch.Tensor]]) -> None:
        """`groups`: the caches of each KV cache group's layers, in the order of their names."""
        self._groups = groups
        first = groups[0][0]
        self._block_size = first.shape[2]
        self.num_heads = first.shape[1]
        self.rows = np.zeros((first.shape[0], self.num_heads), dtype=np.int64)

    @property
    def region(self) -> tuple[int, int, int, str]:
        """Address, bytes, device and name, as NIXL registers memory."""
        return (self.rows.ctypes.data, self.rows.nbytes, 0, "")

    def write(self, block_ids: Sequence[Sequence[int]]) -> None:
        """Of these blocks, by group."""
        for caches, ids in zip(self._groups, block_ids, strict=True):
            if ids:
                self.rows[ids] = block_sums(caches, ids, self._block_size)


@dataclass(frozen=True)
class PulledBlocks:
    """What a rank read from one prefill worker, by KV cache group; blocks are counted in the prefill engine's size.

    Attributes:
        agent_name: NIXL's name of the worker.
        address, num_heads, first_head: where its sums are, of how many KV heads, and the model's number of the first.
        here, there: the blocks' ids on either side.
        lease_row: see Offer.row_of.
    """

    agent_name: str
    address: int
    num_heads: int
    first_head: int
    block_size: int
    here: Sequence[Sequence[int]]
    there: Sequence[Sequence[int]]
    lease_row: tuple[int, bytes]


class ChecksumReader:
    """A decode worker's side: reads the sums of what it pulled, and compares."""

    def __init__(
        self,
        agent: Any,
        groups: Sequence[Sequence[torch.Tensor]],
        first_head: int,
        num_rows: int,
        on_compared: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Args:
        first_head: the model's number of the first KV head that lies here.
        num_rows: blocks of the other side in one request, at most.
        on_compared: called with the number of blocks that were compared.
        """
        self._on_compared = on_compared
        self._agent = agent
        self._groups = groups
        self._first_head = first_head
        self._buffer = np.zeros((num_rows, _MAX_HEADS), dtype=np.int64)
        self._pulled: dict[str, list[PulledBlocks]] = {}

    @property
    def region(self) -> tuple[int, int, int, str]:
        """See ChecksumTable.region."""
        return (self._buffer.ctypes.data, self._buffer.nbytes, 0, "")

    def expect(self, request_id: str, pulled: PulledBlocks) -> None:
        self._pulled.setdefault(request_id, []).append(pulled)

    def drop(self, request_id: str) -> None:
        self._pulled.pop(request_id, None)

    def num_differing(self, request_id: str) -> int:
        """Blocks of the request that are not what the prefill engine had, of those read from each of its workers. To
        be called while the lease is held.

        Raises:
            TimeoutError: the prefill worker did not let its sums be read.
        """
        return sum(
            self._compare(pulled, caches, here, there)
            for pulled in self._pulled.pop(request_id, ())
            for caches, here, there in zip(self._groups, pulled.here, pulled.there, strict=True)
            if here
        )

    def _compare(self, pulled: PulledBlocks, caches: Sequence[torch.Tensor], here: Any, there: Any) -> int:
        theirs = self._read(pulled, there)
        ours = block_sums(caches, here, pulled.block_size)
        begin = max(pulled.first_head, self._first_head)
        end = min(pulled.first_head + pulled.num_heads, self._first_head + ours.shape[1])
        theirs = theirs[:, begin - pulled.first_head : end - pulled.first_head]
        ours = ours[:, begin - self._first_head : end - self._first_head]
        self._on_compared(len(here))
        num_differing = int((theirs != ours).any(axis=1).sum())
        if num_differing:
            address, held = pulled.lease_row
            if self._read_bytes(pulled, [address], len(held)) != held:
                return 0  # the lease, held when the KV cache had arrived, has ended since: these sums are another's
        return num_differing

    def _read(self, pulled: PulledBlocks, block_ids: Sequence[int]) -> np.ndarray[Any, Any]:
        size = pulled.num_heads * 8
        found = self._read_bytes(pulled, [pulled.address + i * size for i in block_ids], size)
        return np.frombuffer(found, dtype=np.int64).reshape(len(block_ids), pulled.num_heads)

    def _read_bytes(self, pulled: PulledBlocks, addresses: Sequence[int], size: int) -> bytes:
        begin = self._buffer.ctypes.data
        to = [(begin + i * size, size, 0) for i in range(len(addresses))]
        source = [(address, size, 0) for address in addresses]
        descs = (self._agent.get_xfer_descs(rows, "DRAM") for rows in (to, source))
        handle = self._agent.initialize_xfer("READ", *descs, pulled.agent_name)
        self._agent.transfer(handle)
        deadline = time.monotonic() + _READ_SECONDS
        while (state := self._agent.check_xfer_state(handle)) == "PROC" and time.monotonic() < deadline:
            time.sleep(0.0005)
        self._agent.release_xfer_handle(handle)
        if state != "DONE":
            raise TimeoutError(f"{len(addresses)} checksums were not read within {_READ_SECONDS:.0f} s")
        return self._buffer.tobytes()[: len(addresses) * size]
