"""NIXL's agent as vLLM's connector uses it, where some reads go another way.

What all such ways have in common: they note the pages of the lists that vLLM prepares, put a read of their own in the
place of NIXL's handle, and tell the peer themselves once it is done.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from vllm.logger import init_logger

from kv_transfer.direct.pages import PageList

logger = init_logger(f"vllm.{__name__}")


class Read(Protocol):
    """What stands in the place of NIXL's handle.

    Attributes:
        peer: NIXL's name for the prefill worker.
        notification: what the worker is to be told at the end, if anything.
    """

    peer: str
    notification: bytes

    def is_done(self) -> bool:
        """Raises what kept it from being done."""

    def telemetry(self) -> Any:
        """Of one that is done; see Telemetry."""


@dataclass(frozen=True)
class _Descriptors:
    """What `prep_xfer_dlist` is given: NIXL's own list, and the pages in it."""

    native: Any
    pages: PageList


@dataclass
class PreparedList:
    """Pages that vLLM reads from or into.

    Attributes:
        agent: whose memory it is.
        reachable: the pages by their addresses in this process; None if only NIXL can read them.
    """

    agent: str
    pages: PageList
    reachable: PageList | None = None


OwnRead = TypeVar("OwnRead", bound=Read)


class DetourAgent(ABC, Generic[OwnRead]):
    """Everything is NIXL's, except the reads that `_read` makes."""

    read_type: type[OwnRead]

    def __init__(self, nixl: Any) -> None:
        self._nixl = nixl
        self._lists: dict[Any, PreparedList] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._nixl, name)

    @abstractmethod
    def _takes(self, mem_type: str | None) -> bool:
        """Whether caches in this kind of memory may be read this way."""

    @abstractmethod
    def _read(
        self, local: PreparedList, remote: PreparedList, local_indices: Any, remote_indices: Any, notification: bytes
    ) -> OwnRead | None:
        """A read of these pages that was not started; None if it is to be NIXL's."""

    @abstractmethod
    def _start(self, read: OwnRead) -> None: ...

    @abstractmethod
    def _forget(self, read: OwnRead) -> None:
        """It is done."""

    @abstractmethod
    def _release(self, read: OwnRead) -> None:
        """Nothing may be written to its pages after this: their blocks may have another owner."""

    # -- lists of pages --

    def get_xfer_descs(self, descs: Any, mem_type: str | None = None) -> Any:
        native = self._nixl.get_xfer_descs(descs, mem_type)
        # vLLM gives its caches as arrays, and what is no cache otherwise.
        is_cache = isinstance(descs, np.ndarray) and self._takes(mem_type)
        return _Descriptors(native, PageList(descs)) if is_cache else native

    def prep_xfer_dlist(self, agent_name: str, xfer_list: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(xfer_list, _Descriptors):
            return self._nixl.prep_xfer_dlist(agent_name, xfer_list, *args, **kwargs)
        handle = self._nixl.prep_xfer_dlist(agent_name, xfer_list.native, *args, **kwargs)
        self._lists[handle] = PreparedList(agent_name, xfer_list.pages)
        return handle

    def release_dlist_handle(self, handle: Any) -> None:
        self._lists.pop(handle, None)
        self._nixl.release_dlist_handle(handle)

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
        if operation == "READ" and local is not None and remote is not None:
            read = self._read(local, remote, local_indices, remote_indices, notif_msg)
            if read is not None:
                return read
        ids = np.asarray(local_indices), np.asarray(remote_indices)
        return self._nixl.make_prepped_xfer(
            operation, local_xfer_side, ids[0], remote_xfer_side, ids[1], notif_msg, **kwargs
        )

    def transfer(self, handle: Any, *args: Any, **kwargs: Any) -> str:
        if not isinstance(handle, self.read_type):
            return str(self._nixl.transfer(handle, *args, **kwargs))
        self._start(handle)
        return "PROC"

    def check_xfer_state(self, handle: Any) -> str:
        """Raises what kept a read from being done."""
        if not isinstance(handle, self.read_type):
            return str(self._nixl.check_xfer_state(handle))
        if not handle.is_done():
            return "PROC"
        self._forget(handle)
        self._notify(handle)
        return "DONE"

    def _notify(self, read: OwnRead) -> None:
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
        is_own = isinstance(handle, self.read_type)
        return handle.telemetry() if is_own else self._nixl.get_xfer_telemetry(handle)

    def release_xfer_handle(self, handle: Any) -> None:
        """Waits, for milliseconds, until a read that is under way writes nothing more."""
        if isinstance(handle, self.read_type):
            self._release(handle)
        else:
            self._nixl.release_xfer_handle(handle)
