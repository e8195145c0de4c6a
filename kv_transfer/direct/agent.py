"""The agent whose reads from peers on the same host are copies between GPUs."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

from kv_transfer.detour import DetourAgent, PreparedList
from kv_transfer.direct import driver
from kv_transfer.direct.ids import AnyIds, as_ids
from kv_transfer.direct.pages import Mapping, PageList
from kv_transfer.direct.transfer import PageCopier, PageTransfer, Telemetry

_LOCAL = "NIXL_INIT_AGENT"
_GPU_MEMORY = "VRAM"
_POLL_SECONDS = 2e-5


@dataclass
class DirectRead:
    """See kv_transfer.detour.Read."""

    peer: str
    notification: bytes
    sources: PageList
    source_ids: AnyIds
    destinations: PageList
    destination_ids: AnyIds
    transfer: PageTransfer | None = None

    def is_done(self) -> bool:
        assert self.transfer is not None
        return self.transfer.is_done()

    def telemetry(self) -> Telemetry:
        assert self.transfer is not None
        return self.transfer.telemetry()


class DirectAgent(DetourAgent[DirectRead]):
    """Reads from peers that `connect` was called for go past NIXL."""

    read_type = DirectRead

    def __init__(self, nixl: Any, copier: PageCopier) -> None:
        super().__init__(nixl)
        self._copier = copier
        self._peers: dict[str, list[Mapping]] = {}
        self._under_way: list[PageTransfer] = []
        self._changing = threading.Lock()  # what is mapped, or read from it

    # -- peers --

    def connect(self, peer: str, mappings: list[Mapping]) -> None:
        """From now on what is read from `peer` is copied from these mappings, which are closed with it.

        Raises:
            UnreachableError: pages of its lists that the kernel can't read; nothing has changed then.
        """
        reached = {}
        for prepared in list(self._lists.values()):
            if prepared.agent in (peer, _LOCAL):
                reachable = prepared.pages.mapped(mappings) if prepared.agent == peer else prepared.pages
                reachable.check_alignment()
                reachable.table(self._copier.device)
                reached[id(prepared)] = (prepared, reachable)
        with self._changing:
            for prepared, reachable in reached.values():
                prepared.reachable = reachable
            self._peers[peer] = mappings

    def is_connected(self, peer: str) -> bool:
        return peer in self._peers

    def disconnect(self, peer: str) -> None:
        """Unmaps what was mapped of the peer, if anything, once nothing reads it. For all threads."""
        with self._changing:
            mappings = self._peers.pop(peer, None)
            if mappings is None:
                return
            for prepared in list(self._lists.values()):
                if prepared.agent == peer:
                    prepared.reachable = None
            for transfer in list(self._under_way):
                transfer.wait()
            with driver.context(self._copier.device):
                for mapping in mappings:
                    driver.close_segment(mapping.address)

    def remove_remote_agent(self, agent: str) -> None:
        self.disconnect(agent)
        self._nixl.remove_remote_agent(agent)

    # -- reads --

    def settle(self, seconds: float) -> None:
        """Waits until no direct read is under way, but not longer than that."""
        deadline = time.perf_counter() + seconds
        while self._under_way and time.perf_counter() < deadline:
            self._under_way = [transfer for transfer in self._under_way if not transfer.is_done()]
            time.sleep(_POLL_SECONDS)

    def _takes(self, mem_type: str | None) -> bool:
        return mem_type == _GPU_MEMORY

    def _read(
        self, local: PreparedList, remote: PreparedList, local_indices: Any, remote_indices: Any, notification: bytes
    ) -> DirectRead | None:
        if local.reachable is None or remote.reachable is None:
            return None
        ids = as_ids(remote_indices), as_ids(local_indices)
        return DirectRead(remote.agent, notification, remote.reachable, ids[0], local.reachable, ids[1])

    def _start(self, read: DirectRead) -> None:
        with self._changing:
            if read.peer not in self._peers:
                raise RuntimeError(f"the prefill worker {read.peer} is gone")
            read.transfer = self._copier.start(read.sources, read.source_ids, read.destinations, read.destination_ids)
            self._under_way.append(read.transfer)

    def _forget(self, read: DirectRead) -> None:
        self._under_way = [transfer for transfer in self._under_way if transfer is not read.transfer]

    def _release(self, read: DirectRead) -> None:
        if read.transfer is not None:
            read.transfer.wait()
