"""NIXL's agent as vLLM's connector uses it, with a second way for what it reads."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm.logger import init_logger

from kv_transfer.direct import driver
from kv_transfer.direct.pages import Ids, Mapping, PageList, RegionIds, as_ids
from kv_transfer.direct.transfer import PageCopier, PageTransfer

logger = init_logger(f"vllm.{__name__}")

_LOCAL = "NIXL_INIT_AGENT"
_GPU_MEMORY = "VRAM"
_POLL_SECONDS = 2e-5


@dataclass(frozen=True)
class _Descriptors:
    """What `prep_xfer_dlist` is given: NIXL's own list, and the pages in it."""

    native: Any
    pages: PageList


@dataclass
class _List:
    """A prepared list.

    Attributes:
        agent: whose memory it is.
        reachable: the pages by their addresses in this process; None if only NIXL can read them.
    """

    agent: str
    pages: PageList
    reachable: PageList | None = None


@dataclass
class DirectRead:
    """A read that goes past NIXL, in the place of NIXL's handle."""

    peer: str
    notification: bytes
    sources: PageList
    source_ids: Ids | RegionIds
    destinations: PageList
    destination_ids: Ids | RegionIds
    transfer: PageTransfer | None = None


class DirectAgent:
    """Everything is NIXL's, except reads from peers that `connect` was called for."""

    def __init__(self, nixl: Any, copier: PageCopier) -> None:
        self._nixl = nixl
        self._copier = copier
        self._lists: dict[Any, _List] = {}
        self._peers: dict[str, list[Mapping]] = {}
        self._under_way: list[PageTransfer] = []
        self._changing = threading.Lock()  # what is mapped, or read from it

    def __getattr__(self, name: str) -> Any:
        return getattr(self._nixl, name)

    # -- lists of pages --

    def get_xfer_descs(self, descs: Any, mem_type: str | None = None) -> Any:
        native = self._nixl.get_xfer_descs(descs, mem_type)
        # vLLM gives its caches as arrays, and what is no cache otherwise.
        is_cache = mem_type == _GPU_MEMORY and isinstance(descs, np.ndarray)
        return _Descriptors(native, PageList(descs)) if is_cache else native

    def prep_xfer_dlist(self, agent_name: str, xfer_list: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(xfer_list, _Descriptors):
            return self._nixl.prep_xfer_dlist(agent_name, xfer_list, *args, **kwargs)
        handle = self._nixl.prep_xfer_dlist(agent_name, xfer_list.native, *args, **kwargs)
        self._lists[handle] = _List(agent_name, xfer_list.pages)
        return handle

    def release_dlist_handle(self, handle: Any) -> None:
        self._lists.pop(handle, None)
        self._nixl.release_dlist_handle(handle)

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

    def make_prepped_xfer(
        self,
        operation: str,
        local_xfer_side: Any,
        local_indices: Any,
        remote_xfer_side: Any,
        remote_indices: Any,
        notif_msg: bytes = b"",
        **kwargs: Any,
    ) -> Any:
        local, remote = self._lists.get(local_xfer_side), self._lists.get(remote_xfer_side)
        ours, theirs = (None if side is None else side.reachable for side in (local, remote))
        if operation != "READ" or ours is None or theirs is None or remote is None:
            ids = np.asarray(local_indices), np.asarray(remote_indices)
            return self._nixl.make_prepped_xfer(
                operation, local_xfer_side, ids[0], remote_xfer_side, ids[1], notif_msg, **kwargs
            )
        return DirectRead(
            peer=remote.agent,
            notification=notif_msg,
            sources=theirs,
            source_ids=as_ids(remote_indices),
            destinations=ours,
            destination_ids=as_ids(local_indices),
        )

    def transfer(self, handle: Any, *args: Any, **kwargs: Any) -> str:
        if not isinstance(handle, DirectRead):
            return str(self._nixl.transfer(handle, *args, **kwargs))
        with self._changing:
            if handle.peer not in self._peers:
                raise RuntimeError(f"the prefill worker {handle.peer} is gone")
            handle.transfer = self._copier.start(
                handle.sources, handle.source_ids, handle.destinations, handle.destination_ids
            )
            self._under_way.append(handle.transfer)
        return "PROC"

    def settle(self, seconds: float) -> None:
        """Waits until no direct read is under way, but not longer than that."""
        deadline = time.perf_counter() + seconds
        while self._under_way and time.perf_counter() < deadline:
            self._under_way = [transfer for transfer in self._under_way if not transfer.is_done()]
            time.sleep(_POLL_SECONDS)

    def check_xfer_state(self, handle: Any) -> str:
        if not isinstance(handle, DirectRead):
            return str(self._nixl.check_xfer_state(handle))
        assert handle.transfer is not None
        if not handle.transfer.is_done():
            return "PROC"
        self._under_way = [transfer for transfer in self._under_way if transfer is not handle.transfer]
        self._notify(handle)
        return "DONE"

    def _notify(self, read: DirectRead) -> None:
        # With NIXL the notification follows the last byte by itself. One that is lost costs the peer its lease's time.
        message, read.notification = read.notification, b""
        if message:
            try:
                self._nixl.send_notif(read.peer, notif_msg=message)
            except Exception:
                logger.exception(
                    "peer %s could not be told that %r was read; its lease has to run out", read.peer, message
                )

    def get_xfer_telemetry(self, handle: Any) -> Any:
        if not isinstance(handle, DirectRead):
            return self._nixl.get_xfer_telemetry(handle)
        assert handle.transfer is not None
        return handle.transfer.telemetry()

    def release_xfer_handle(self, handle: Any) -> None:
        """Waits for a read that is under way: it takes milliseconds, and must not write into blocks that have another
        owner by then."""
        if not isinstance(handle, DirectRead):
            self._nixl.release_xfer_handle(handle)
        elif handle.transfer is not None:
            handle.transfer.wait()
