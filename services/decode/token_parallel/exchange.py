"""Rows between the ranks of a token-parallel group over symmetric memory, inside CUDA graphs.

The root writes query, key and value rows into their owner's memory and raises a flag there; the owner writes the
attention outputs into the root's and raises a flag in turn. No call needs the host or the other side to take part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from services.decode.token_parallel.micro_batch import MAX_MICRO_BATCHES
from services.decode.token_parallel.rows import RowLayout

NOBODY = -1
_NEVER_NEEDED = -(1 << 62)
_BLOCK = 2048  # columns of one Triton program
_WAIT_REGISTERS = 32  # so that the spinning program fits beside an attention kernel that takes nearly all registers


class SymmetricMemory:
    """A buffer of the same size on every rank, which all of them can write to."""

    def __init__(self, group: Any, num_bytes: int, device: torch.device) -> None:
        """Called by every rank of `group`, a torch.distributed process group, at the same time.

        Raises:
            RuntimeError: the devices can't reach one another's memory.
        """
        import torch.distributed._symmetric_memory as symmetric_memory  # the module has no public name yet

        self.own = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
        handle = symmetric_memory.rendezvous(self.own, group)
        self.own.zero_()
        self.addresses = [int(address) for address in handle.buffer_ptrs]
        """Of each rank's buffer, as this process sees it."""
        torch.cuda.synchronize()
        torch.distributed.barrier(group)


@dataclass(frozen=True)
class StepTables:
    """What changes from step to step. In device memory `StepBuffers` holds it at fixed addresses.

    Attributes:
        step: int64 `[1]`, layers counted before this step.
        place: for the root, where each batch row is found in the micro-batches' outputs put together, int64
            `[max_rows]`.
        target_rank, target_row, needed: per micro-batch, as `symmetric_kernels` wants them.
        order: per micro-batch, the batch row of each of its rows, int64 `[max_rows]`; for the root.
    """

    step: Any
    place: Any
    target_rank: Sequence[Any]
    target_row: Sequence[Any]
    order: Sequence[Any]
    needed: Sequence[Any]

    @classmethod
    def of(cls, parts: Sequence[Any]) -> StepTables:
        """From parts in the order of `parts()`."""
        return cls(parts[0], parts[1], parts[2::4], parts[3::4], parts[4::4], parts[5::4])

    def parts(self) -> list[Any]:
        """All arrays: step, place, and then those of each micro-batch."""
        by_micro_batch = zip(self.target_rank, self.target_row, self.order, self.needed, strict=True)
        return [self.step, self.place, *(part for parts in by_micro_batch for part in parts)]


class StepBuffers:
    """`StepTables` in device memory; one copy fills all of it."""

    def __init__(self, size: int, max_rows: int, device: torch.device) -> None:
        self._lengths = [1, max_rows] + [max_rows, max_rows, max_rows, size] * MAX_MICRO_BATCHES
        self._device = torch.zeros(sum(self._lengths), dtype=torch.int64, device=device)
        self.tables = StepTables.of(self._device.split(self._lengths))
        self.write(self.idle())

    def idle(self) -> StepTables:
        """Host tables by which nobody sends and nobody waits: to begin with, and for warm-up and capture."""
        tables = StepTables.of([np.zeros(length, np.int64) for length in self._lengths])
        tables.step[:] = -(1 << 40)  # what warm-up raises flags to stays below any live step
        for target_rank, needed in zip(tables.target_rank, tables.needed, strict=True):
            target_rank[:] = NOBODY
            needed[:] = _NEVER_NEEDED
        return tables

    def write(self, tables: StepTables) -> None:
        """Enqueues the copy of host tables on the current stream."""
        host = torch.from_numpy(np.concatenate(tables.parts()))
        if self._device.is_cuda:
            host = host.pin_memory()  # a fresh buffer each step: the host runs ahead of the copy
        self._device.copy_(host, non_blocking=True)


class Exchange:
    """One rank's side of the exchange; ranks are token-parallel ranks, 0 is the root."""

    def __init__(
        self,
        memory: Any,
        rank: int,
        size: int,
        max_rows: int,
        row_width: int,
        dtype: torch.dtype,
        peers: tuple[int, int] | None = None,
    ) -> None:
        """Args:
        memory: `SymmetricMemory` of at least `num_bytes(...)`.
        max_rows: rows of a micro-batch.
        row_width: elements of the widest row of any layer, either way; a multiple of 64.
        peers: first rank, and the one after the last, that rows come from and go to; None where those are the root's
            KV workers, or the root of a KV worker.
        """
        self.rank, self.size, self.max_rows = rank, size, max_rows
        self._peers = peers or ((0, 1) if rank else (1, size))
        self._row_width, self._dtype = row_width, dtype
        self._rows_bytes = max_rows * row_width * dtype.itemsize
        self._flags_at = MAX_MICRO_BATCHES * self._rows_bytes
        device = memory.own.device
        self._memory = memory
        self._addresses = torch.tensor(memory.addresses, dtype=torch.int64, device=device)
        self._arrived = torch.zeros(MAX_MICRO_BATCHES, dtype=torch.int32, device=device)
        flags = memory.own[self._flags_at : self._flags_at + MAX_MICRO_BATCHES * size * 8].view(torch.int64)
        self._flags = flags.view(MAX_MICRO_BATCHES, size)
        self.buffers = StepBuffers(size, max_rows, device)
        self.tables = self.buffers.tables
        self.num_steps = 0
        self._max_ranks = 1 << (size - 1).bit_length()

    @staticmethod
    def num_bytes(size: int, max_rows: int, row_width: int, dtype: torch.dtype) -> int:
        """Bytes of symmetric memory that each rank needs."""
        return MAX_MICRO_BATCHES * (max_rows * row_width * int(dtype.itemsize) + size * 8)

    def received(self, micro_batch: int, num_rows: int, width: int, row_width: int | None = None) -> torch.Tensor:
        """The rows that others wrote here, `[num_rows, width]`; see `put` for `row_width`."""
        row_width = row_width or self._row_width
        start = micro_batch * self._rows_bytes
        rows = self._memory.own[start : start + self.max_rows * row_width * self._dtype.itemsize].view(self._dtype)
        return rows.view(self.max_rows, row_width)[:num_rows, :width]

    def send(self, micro_batch: int, layer: int, layout: RowLayout, parts: tuple[torch.Tensor | None, ...]) -> None:
        """On the root: query, key and value rows of `[num_rows, heads, head_size]` to their owners."""
        query, key, value = (*parts, None, None)[:3]
        self.put(micro_batch, layer, (query, key, value), layout.widths)

    def answer(self, micro_batch: int, layer: int, output: torch.Tensor) -> None:
        """On a KV worker: attention outputs `[num_rows, num_heads, head_size_v]` to the root."""
        self.put(micro_batch, layer, (output, None, None), (output.shape[1] * output.shape[2],))

    def put(
        self,
        micro_batch: int,
        layer: int,
        parts: tuple[torch.Tensor | None, ...],
        widths: tuple[int, ...],
        row_width: int | None = None,
    ) -> None:
        """Rows, whose parts lie side by side at the target, to where the step's tables say; then all peers' flags.

        Args:
            parts: up to three tensors `[num_rows, heads, head_size]`.
            widths: elements of a row of each.
            row_width: elements from one row to the next at the target, a multiple of 64; None for those of the widest.
        """
        from services.decode.token_parallel.symmetric_kernels import put_rows

        query = parts[0]
        assert query is not None
        query, key, value = (query if part is None else part for part in parts)
        widths = (*widths, 0, 0)[:3]
        grid = (query.shape[0], -(-sum(widths) // _BLOCK))
        put_rows[grid](
            query,
            key,
            value,
            query.stride(0),
            key.stride(0),
            value.stride(0),
            self.tables.target_rank[micro_batch],
            self.tables.target_row[micro_batch],
            self._addresses,
            micro_batch * self._rows_bytes,
            self._addresses,
            self._flags_at + (micro_batch * self.size + self.rank) * 8,
            self._arrived[micro_batch:],
            self.tables.step,
            layer,
            ROW_WIDTH=row_width or self._row_width,
            QUERY_WIDTH=widths[0],
            KEY_WIDTH=widths[1],
            VALUE_WIDTH=widths[2],
            FIRST_RANK=self._peers[0],
            END_RANK=self._peers[1],
            MAX_RANKS=self._max_ranks,
            BLOCK=_BLOCK,
        )

    def wait(self, micro_batch: int, layer: int) -> None:
        """Holds up the current stream until this layer's rows are here, of all peers that the tables name."""
        from services.decode.token_parallel.symmetric_kernels import wait_for_flags

        options = {"maxnreg": _WAIT_REGISTERS} if self._flags.is_cuda else {}
        wait_for_flags[(1,)](
            self._flags[micro_batch],
            self.tables.needed[micro_batch],
            layer,
            FIRST_RANK=self._peers[0],
            END_RANK=self._peers[1],
            MAX_RANKS=self._max_ranks,
            num_warps=1,
            **options,
        )

    def take(self, micro_batch: int, output: torch.Tensor) -> None:
        """On the root: puts the outputs that arrived beside its own in `output`, of the same shape as theirs."""
        from services.decode.token_parallel.symmetric_kernels import take_rows

        num_rows, width = output.shape[0], output.shape[1] * output.shape[2]
        source = self.received(micro_batch, num_rows, width)
        take_rows[(num_rows, -(-width // _BLOCK))](
            source,
            source.stride(0),
            output,
            output.stride(0),
            self.tables.target_rank[micro_batch],
            WIDTH=width,
            BLOCK=_BLOCK,
        )
