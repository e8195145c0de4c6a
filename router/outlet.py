"""A client's connection as a request sees it: the way out for streams, without a coroutine, and word of its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Outlet:
    """Set up and kept true by the connection's protocol (router/protocol.py)."""

    __slots__ = ("_on_lost", "has_body", "is_lost", "is_shut", "write")

    def __init__(self, transport: asyncio.WriteTransport) -> None:
        self.write = transport.write
        self.is_shut = False  # the client takes no more for the moment, or is gone
        self.is_lost = False  # it is gone
        self.has_body = False  # all of the last request's body has come, and so all of those before
        self._on_lost: Callable[[], object] | None = None

    def tell(self, on_lost: Callable[[], object]) -> None:
        """Calls this, and nothing else, when the client is gone; at once if it is already."""
        self._on_lost = on_lost
        if self.is_lost:
            on_lost()

    def forget(self, on_lost: Callable[[], object]) -> None:
        """Does not call this any more. The connection's next request may have said already whom to call."""
        if self._on_lost is on_lost:
            self._on_lost = None

    def lose(self) -> None:
        self.is_shut = self.is_lost = True
        if self._on_lost is not None:
            self._on_lost()
