"""What a prefill engine says of the KV cache that it offers, so that a reader can tell in the end whether it read that.

Every lease takes a *slot*. Each prefill worker keeps a table with a row for each slot, which decode ranks can read as
they read its KV cache, without its doing: the worker's epoch, drawn at random when it starts, and the slot's
*generation*, the number of leases in it that have ended. An offer names slot and generation. A worker counts a lease's
end before its scheduler hears of it, and so before any of its blocks can be given to another request. Hence a reader
that finds epoch and generation as offered, *after* its last byte has arrived, has read what was offered: nobody else
can have written to these blocks before. It finds another generation if the lease ran out meanwhile, another epoch, or
nothing, if the engine was started again.

The prompt's digest, which also travels in the offer, is compared before anything is read.
"""

from __future__ import annotations

import hashlib
import secrets
from array import array
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlHandshakePayload

OFFER_PARAM = "tknp_offer"
"""Key in `kv_transfer_params` under which a prefill engine describes its offer; a stock engine's lack it."""

ROW_BYTES = 24
NUM_SLOTS = 8192
"""Leases that an engine can have at a time; one that finds no slot is not given."""


@dataclass(frozen=True)
class LeaseTableAddress:
    """Where a worker's table lies in its memory, and the epoch that stands in it; in the test mode of
    kv_transfer.checksums also where its checksums are, and of how many KV heads."""

    address: int
    epoch: int
    checksums: int = 0
    num_heads: int = 0


@dataclass
class HandshakePayload(NixlHandshakePayload):
    """vLLM's payload and the worker's lease table. A stock decode engine ignores what it does not know.

    Attributes:
        side_channel: where the worker listens (kv_transfer.side_channel).
        streams: where its scheduler tells of requests that are still computed (kv_transfer.stream_source).
        tells_layers: the worker tells of these, too (kv_transfer.layer_source).
    """

    lease_table: tuple[int, ...] = ()
    side_channel: str = ""
    streams: str = ""
    tells_layers: bool = False


class LeaseTable:
    """A prefill worker's table: `rows[slot]` is (epoch, generation, ready), 64 bits each; `ready` is the generation + 1
    once its checksums are written (kv_transfer.checksums)."""

    def __init__(self) -> None:
        self.epoch = secrets.randbits(64)
        self.rows = np.zeros((NUM_SLOTS, 3), dtype=np.uint64)
        self.rows[:, 0] = self.epoch

    @property
    def region(self) -> tuple[int, int, int, str]:
        """Address, bytes, device and name, as NIXL registers memory."""
        return (self.rows.ctypes.data, self.rows.nbytes, 0, "")

    def end(self, slot: int) -> None:
        """From now on readers of the slot's present lease find that it has ended."""
        self.rows[slot, 1] += np.uint64(1)

    def mark_ready(self, slot: int) -> None:
        """The checksums of the slot's present lease are written."""
        self.rows[slot, 2] = self.rows[slot, 1] + np.uint64(1)


@dataclass(frozen=True)
class Offer:
    """One request's KV cache, held for whoever reads it.

    Attributes:
        slot, generation: see the module.
        prompt: digest of the prompt's tokens.
        tables: where each prefill worker's table is, by (pipeline rank, tensor-parallel rank).
    """

    slot: int
    generation: int
    prompt: str
    tables: Mapping[tuple[int, int], LeaseTableAddress]

    def to_param(self) -> dict[str, Any]:
        """As JSON; numbers of 64 bits as text, which every JSON parser between here and the reader keeps."""
        tables = [[*worker, *map(str, astuple(table))] for worker, table in self.tables.items()]
        return {"slot": self.slot, "generation": self.generation, "prompt": self.prompt, "tables": tables}

    @classmethod
    def from_param(cls, param: Any) -> Offer | None:
        """None for what is no offer: it came over HTTP, and must not end the engine."""
        try:
            tables = {
                (int(pp_rank), int(tp_rank)): LeaseTableAddress(*map(int, table))
                for pp_rank, tp_rank, *table in param["tables"]
            }
            offer = cls(int(param["slot"]), int(param["generation"]), str(param["prompt"]), tables)
        except (KeyError, TypeError, ValueError):
            return None
        return offer if 0 <= offer.slot < NUM_SLOTS else None

    def row_of(self, worker: tuple[int, int]) -> tuple[int, bytes]:
        """Where this lease's row is in a worker's memory, and what must stand there, but for `ready`.

        Raises:
            KeyError: the offer names no such worker.
        """
        table = self.tables[worker]
        expected = np.array([table.epoch, self.generation], dtype=np.uint64).tobytes()
        return table.address + self.slot * ROW_BYTES, expected


def prompt_digest(token_ids: Sequence[int]) -> str:
    """Of a prompt's tokens; 16 bytes in hex."""
    return hashlib.blake2b(array("q", token_ids).tobytes(), digest_size=16).hexdigest()


class LeaseSlots:
    """A prefill scheduler's view of its leases: who has which slot. All of its workers follow it."""

    def __init__(self) -> None:
        # First in, first out: a worker that runs a step ahead of its scheduler has counted a slot's last lease long
        # before the slot comes round again.
        self._free = deque(range(NUM_SLOTS))
        self._generations = [0] * NUM_SLOTS
        self._taken: dict[str, int] = {}
        self._tables: dict[tuple[int, int], LeaseTableAddress] = {}

    def know(self, payloads: Mapping[tuple[int, int], Any]) -> None:
        """Takes the workers' tables from their handshake metadata, by (token-parallel or pipeline rank, tensor-parallel
        rank)."""
        self._tables = {
            worker: LeaseTableAddress(*payload.lease_table)
            for worker, payload in payloads.items()
            if isinstance(payload, HandshakePayload)
        }

    @property
    def has_room(self) -> bool:
        return bool(self._free)

    def take(self, request_id: str, prompt_token_ids: Sequence[int], rank: int = 0) -> Offer:
        """A slot for the request's lease, and what to tell its reader.

        Args:
            rank: token-parallel rank that keeps it.
        """
        slot = self._taken[request_id] = self._free.popleft()
        tables = {(0, shard): table for (owner, shard), table in self._tables.items() if owner == rank}
        return Offer(slot, self._generations[slot], prompt_digest(prompt_token_ids), tables)

    def slot_of(self, request_id: str) -> int:
        return self._taken[request_id]

    def end(self, request_ids: Iterable[str]) -> None:
        """All workers have ended these requests' leases; those that had none are passed over."""
        for request_id in request_ids:
            if (slot := self._taken.pop(request_id, None)) is not None:
                self._generations[slot] += 1
                self._free.append(slot)

    def __len__(self) -> int:
        return len(self._taken)
