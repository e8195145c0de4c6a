"""The agent whose reads from some peers are packed."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from kv_transfer.detour import DetourAgent, PreparedList
from kv_transfer.direct.pages import UnreachableError
from kv_transfer.packed.puller import Puller
from kv_transfer.packed.read import PackedRead, PeerLostError

_SETTLE_POLL_SECONDS = 1e-4


class PackedAgent(DetourAgent[PackedRead]):
    """Reads from peers that `connect` was called for are packed there."""

    read_type = PackedRead

    def __init__(self, nixl: Any, puller: Puller) -> None:
        super().__init__(nixl)
        self._puller = puller
        self._packed_peers: set[str] = set()
        self._under_way: list[PackedRead] = []

    def connect(self, peer: str, address: str) -> None:
        """From now on what is read from `peer` is packed by the worker whose side channel is at `address`.

        Raises:
            UnreachableError: it can't be.
        """
        lists = [prepared.pages for prepared in list(self._lists.values()) if prepared.agent == peer]
        if not lists:
            raise UnreachableError("it has no KV cache")
        self._puller.connect(peer, address, lists[-1])
        self._packed_peers.add(peer)

    def remove_remote_agent(self, agent: str) -> None:
        self._packed_peers.discard(agent)
        self._puller.disconnect(agent)
        self._nixl.remove_remote_agent(agent)

    def settle(self, seconds: float) -> None:
        """Waits until no packed read is under way, but not longer than that."""
        deadline = time.perf_counter() + seconds
        while any(read.is_pending for read in self._under_way) and time.perf_counter() < deadline:
            time.sleep(_SETTLE_POLL_SECONDS)

    def _takes(self, mem_type: str | None) -> bool:
        return True

    def _read(
        self, local: PreparedList, remote: PreparedList, local_indices: Any, remote_indices: Any, notification: bytes
    ) -> PackedRead | None:
        if remote.agent not in self._packed_peers:
            return None
        if not self._puller.is_connected(remote.agent):
            raise PeerLostError(f"the prefill worker {remote.agent} is gone")
        source_ids, ids = (np.asarray(indices, dtype=np.int32) for indices in (remote_indices, local_indices))
        return PackedRead(remote.agent, notification, source_ids, local.pages, ids)

    def _start(self, read: PackedRead) -> None:
        read.post()
        self._under_way.append(read)
        self._puller.start(read)

    def _forget(self, read: PackedRead) -> None:
        self._under_way = [one for one in self._under_way if one is not read]

    def _release(self, read: PackedRead) -> None:
        self._forget(read)
        read.cancel()
