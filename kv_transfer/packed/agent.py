"""NIXL's agent as vLLM's connector uses it, whose reads from some peers are packed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm.logger import init_logger

from kv_transfer.direct.pages import PageList, UnreachableError
from kv_transfer.packed.puller import Puller
from kv_transfer.packed.read import PackedRead, PeerLostError

logger = init_logger(f"vllm.{__name__}")

_SETTLE_POLL_SECONDS = 1e-4


@dataclass(frozen=True)
class _Descriptors:
    """What `prep_xfer_dlist` is given: NIXL's own list, and the pages in it."""

    native: Any
    pages: PageList


class PackedAgent:
    """Everything is NIXL's, except reads from peers that `connect` was called for."""

    def __init__(self, nixl: Any, puller: Puller) -> None:
        self._nixl = nixl
        self._puller = puller
        self._lists: dict[Any, tuple[str, PageList]] = {}
        self._packed_peers: set[str] = set()
        self._under_way: list[PackedRead] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._nixl, name)

    def get_xfer_descs(self, descs: Any, mem_type: str | None = None) -> Any:
        native = self._nixl.get_xfer_descs(descs, mem_type)
        # vLLM gives its caches as arrays, and what is no cache otherwise.
        return _Descriptors(native, PageList(descs)) if isinstance(descs, np.ndarray) else native

    def prep_xfer_dlist(self, agent_name: str, xfer_list: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(xfer_list, _Descriptors):
            return self._nixl.prep_xfer_dlist(agent_name, xfer_list, *args, **kwargs)
        handle = self._nixl.prep_xfer_dlist(agent_name, xfer_list.native, *args, **kwargs)
        self._lists[handle] = (agent_name, xfer_list.pages)
        return handle

    def release_dlist_handle(self, handle: Any) -> None:
        self._lists.pop(handle, None)
        self._nixl.release_dlist_handle(handle)

    def connect(self, peer: str, address: str) -> None:
        """From now on what is read from `peer` is packed by the worker whose side channel is at `address`.

        Raises:
            UnreachableError: it can't be.
        """
        lists = [pages for agent, pages in list(self._lists.values()) if agent == peer]
        if not lists:
            raise UnreachableError("it has no KV cache")
        self._puller.connect(peer, address, lists[-1])
        self._packed_peers.add(peer)

    def remove_remote_agent(self, agent: str) -> None:
        self._packed_peers.discard(agent)
        self._puller.disconnect(agent)
        self._nixl.remove_remote_agent(agent)

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
        if operation != "READ" or local is None or remote is None or remote[0] not in self._packed_peers:
            return self._nixl.make_prepped_xfer(
                operation, local_xfer_side, local_indices, remote_xfer_side, remote_indices, notif_msg, **kwargs
            )
        if not self._puller.is_connected(remote[0]):
            raise PeerLostError(f"the prefill worker {remote[0]} is gone")
        source_ids, ids = (np.asarray(indices, dtype=np.int32) for indices in (remote_indices, local_indices))
        return PackedRead(remote[0], notif_msg, source_ids, local[1], ids)

    def transfer(self, handle: Any, *args: Any, **kwargs: Any) -> str:
        if not isinstance(handle, PackedRead):
            return str(self._nixl.transfer(handle, *args, **kwargs))
        handle.post()
        self._under_way.append(handle)
        self._puller.start(handle)
        return "PROC"

    def settle(self, seconds: float) -> None:
        """Waits until no packed read is under way, but not longer than that."""
        deadline = time.perf_counter() + seconds
        while any(read.is_pending for read in self._under_way) and time.perf_counter() < deadline:
            time.sleep(_SETTLE_POLL_SECONDS)

    def check_xfer_state(self, handle: Any) -> str:
        """Raises what kept a packed read from being done."""
        if not isinstance(handle, PackedRead):
            return str(self._nixl.check_xfer_state(handle))
        if not handle.is_done():
            return "PROC"
        self._forget(handle)
        self._notify(handle)
        return "DONE"

    def _forget(self, read: PackedRead) -> None:
        self._under_way = [one for one in self._under_way if one is not read]

    def _notify(self, read: PackedRead) -> None:
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
        return handle.telemetry() if isinstance(handle, PackedRead) else self._nixl.get_xfer_telemetry(handle)

    def release_xfer_handle(self, handle: Any) -> None:
        """Of a packed read, waits for what takes it out of slots now, milliseconds; nothing is written afterwards."""
        if not isinstance(handle, PackedRead):
            self._nixl.release_xfer_handle(handle)
            return
        self._forget(handle)
        handle.cancel()
