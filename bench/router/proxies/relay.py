"""What nothing can beat here: every packet passed on as it comes, by one uvloop and no HTTP at all.

python relay.py PORT ENGINE_URL
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any
from urllib.parse import urlsplit

import uvloop


class Side(asyncio.Protocol):
    """One connection, whose bytes go to its `other` side."""

    def __init__(self, other: Side | None = None) -> None:
        self.other = other
        self.transport: Any = None
        self.early = b""  # what came before there was another side

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None:
            self.other.transport.close()

    def data_received(self, data: bytes) -> None:
        if self.other is None:
            self.early += data
        else:
            self.other.transport.write(data)


class ClientSide(Side):
    def __init__(self, host: str, port: int) -> None:
        super().__init__()
        self._engine = host, port

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._connecting = asyncio.create_task(self._connect())

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        _, engine_side = await loop.create_connection(lambda: Side(self), *self._engine)
        self.other = engine_side
        engine_side.transport.write(self.early)


async def serve(port: int, url: str) -> None:
    engine = urlsplit(url)
    host, engine_port = engine.hostname or "", engine.port or 80
    server = await asyncio.get_running_loop().create_server(
        lambda: ClientSide(host, engine_port), "127.0.0.1", port, backlog=4096
    )
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), sys.argv[2]))
