"""What a token-parallel engine offers. A reader knows nothing of ranks: to it each rank is an engine of its own, with a
side channel of its own, whose blocks it names by the rank's ids."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from tknp.common.partition import BlockPartition
from tknp.common.ports import PortError, free_port

_OPENING_SECONDS = 30

Workers = Mapping[tuple[int, int], Any]
"""Handshake payloads by (token-parallel rank, shard), and of a rank by (0, shard), as of any engine."""


def engine_id_of(engine_id: str, rank: int) -> str:
    """By which other engines know a rank."""
    return f"{engine_id}-rank{rank}"


def of_rank(workers: Workers, rank: int) -> dict[tuple[int, int], Any]:
    """A rank's workers, as those of an engine."""
    return {(0, shard): payload for (owner, shard), payload in workers.items() if owner == rank}


class RankOffers:
    """On a token-parallel engine's scheduler: which rank keeps what, and where each is reached."""

    def __init__(self, partition: BlockPartition, engine_id: str) -> None:
        self._partition = partition
        self._engine_id = engine_id
        self._ports: dict[int, int] = {}
        self._threads: list[threading.Thread] = []
        self._keepers: dict[str, int] = {}

    def listen(self, workers: Workers, listener: Callable[..., None], stop: threading.Event, address: Any) -> None:
        """Opens the side channels of all ranks but the first, whose is the engine's.

        Args:
            listener: vLLM's (NixlBaseConnectorScheduler._nixl_handshake_listener), called in a thread.
            address: the engine's host and port.
        """
        host, self._ports[0] = address
        encode = msgspec.msgpack.Encoder().encode
        for rank in range(1, self._partition.size):
            port = self._ports[rank] = free_port()
            ready = threading.Event()
            told = {worker: encode(payload) for worker, payload in of_rank(workers, rank).items()}
            thread = threading.Thread(target=listener, args=(told, ready, stop, host, port), daemon=True)
            thread.start()
            if not ready.wait(_OPENING_SECONDS):
                raise PortError(
                    f"port {port} of {host}, which was free, could not be opened within {_OPENING_SECONDS} s"
                )
            self._threads.append(thread)

    def place(self, request_id: str, rank: int) -> None:
        """The request, whose KV cache is to be kept, has its blocks there; after a preemption, anew."""
        self._keepers[request_id] = rank

    def keeper_of(self, request_id: str) -> int:
        """Where it was placed last; the first rank if it never was."""
        return self._keepers.get(request_id, 0)

    def forget(self, request_id: str) -> None:
        """It has ended."""
        self._keepers.pop(request_id, None)

    def as_of_rank(self, params: dict[str, Any], rank: int) -> dict[str, Any]:
        """vLLM's `kv_transfer_params` of a request that is kept, for its reader."""
        base = self._partition.bases[rank]
        return params | {
            "remote_engine_id": engine_id_of(self._engine_id, rank),
            "remote_port": self._ports[rank],
            "remote_block_ids": tuple([block_id - base for block_id in group] for group in params["remote_block_ids"]),
            "tp_size": self._partition.num_shards,
        }

    def close(self) -> None:
        """Once `stop` is set."""
        for thread in self._threads:
            thread.join()
