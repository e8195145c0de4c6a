"""Notices that a file changed. Its state is polled: that also works for Kubernetes' mounted secrets and on NFS."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

_State = tuple[int, int, int] | None


class WatchedFile:
    """Make it before the file is first read, so that no change is missed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._state = self._read()

    async def watch(self, interval: float, on_change: Callable[[], Awaitable[None]]) -> None:
        """Never ends. Looks every `interval` seconds, on a thread: a file system that hangs stops nobody."""
        while True:
            await asyncio.sleep(interval)
            state = await asyncio.to_thread(self._read)
            if state != self._state:
                self._state = state
                await on_change()

    def _read(self) -> _State:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino
