"""A connection's way out to the client, for streams: what is written needs no coroutine."""

from __future__ import annotations

import asyncio


class Outlet:
    """Set up and kept true by the connection's protocol (router/protocol.py)."""

    __slots__ = ("is_shut", "write")

    def __init__(self, transport: asyncio.WriteTransport) -> None:
        self.write = transport.write
        self.is_shut = False  # the client takes no more for the moment, or is gone
