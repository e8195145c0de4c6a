"""The HTTP/1.1 client of the hot path: one POST to an engine, its answer read whole or as it comes.

aiohttp's client costs more per request than all that the router itself does with it; a leg needs none of what that is
spent on. httptools parses, as in uvicorn. Everything that is not on the hot path stays with aiohttp.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httptools

KEEPALIVE_SECONDS = 2.0
"""vLLM's server closes an idle connection after 5 s; a request sent just then would look like a dead engine."""
MAX_UNREAD_BYTES = 256 * 2**10
"""Of an answer that nobody reads: beyond it the engine is made to wait, as the client makes us wait."""
MAX_HEADER_BYTES = 64 * 2**10


class ConnectFailedError(OSError):
    """No connection came about, so nothing was sent; `strerror` says why."""


class ConnectTimeoutError(TimeoutError):
    """Connecting took too long; nothing was sent."""


class ConnectionBrokenError(OSError):
    """The connection ended before the answer did."""


class NotHttpError(Exception):
    """What came is not HTTP."""


class EngineResponse:
    """An answer whose head is here. `close` must be called; before the answer's end it closes the connection, which
    makes vLLM abort the request."""

    __slots__ = ("_connection", "content", "content_type", "status")

    def __init__(self, connection: EngineConnection) -> None:
        self._connection: EngineConnection | None = connection
        self.content = connection  # as aiohttp's: response.content.readany()
        self.status = connection.status
        self.content_type = connection.content_type

    async def read(self) -> bytes:
        """The whole body."""
        return await self.content.read()

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release()

    async def __aenter__(self) -> EngineResponse:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class EngineClient:
    """Connections to engines, kept open between requests; without a limit, because admission is not its business."""

    def __init__(self, connect_timeout: float, headers: dict[str, str] | None = None) -> None:
        """`headers` go with every request; connect_timeout is in seconds."""
        self._idle: dict[str, list[EngineConnection]] = {}
        self._connect_timeout = connect_timeout
        self._headers = _header_lines(headers or {})
        self._now = asyncio.get_running_loop().time

    async def post(self, origin: str, path: str, headers: dict[str, str], body: bytes) -> EngineResponse:
        """Sends one request and returns when the answer's head is here.

        Args:
            origin: scheme://host:port.
            headers: names and values without line breaks.

        Raises:
            ConnectFailedError, ConnectTimeoutError: nothing was sent.
            ConnectionBrokenError, NotHttpError: the engine may have worked on it.
        """
        connection = self._take_idle(origin) or await self._connect(origin)
        try:
            connection.send(
                b"POST %b HTTP/1.1\r\nHost: %b\r\n%b%bContent-Length: %d\r\n\r\n%b"
                % (
                    path.encode("ascii"),
                    origin.partition("//")[2].encode("ascii"),
                    self._headers,
                    _header_lines(headers),
                    len(body),
                    body,
                )
            )
            await connection.head()
        except BaseException:
            connection.abort()
            raise
        return EngineResponse(connection)

    def close(self) -> None:
        """Closes what is idle; connections in use close with their responses."""
        for connections in self._idle.values():
            while connections:
                connections.pop().abort()

    def _take_idle(self, origin: str) -> EngineConnection | None:
        """The one used last, if it is young enough; older ones are closed."""
        connections = self._idle.get(origin)
        if not connections:
            return None
        oldest = self._now() - KEEPALIVE_SECONDS
        if connections[0].idle_since < oldest:
            for connection in [c for c in connections if c.idle_since < oldest]:
                connection.abort()
            connections[:] = [c for c in connections if c.idle_since >= oldest]
        return connections.pop() if connections else None

    async def _connect(self, origin: str) -> EngineConnection:
        idle = self._idle.setdefault(origin, [])
        parts = urlsplit(origin)
        context = ssl.create_default_context() if parts.scheme == "https" else None
        port = parts.port or (443 if context else 80)
        try:
            async with asyncio.timeout(self._connect_timeout):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: EngineConnection(idle), parts.hostname or "", port, ssl=context
                )
        except TimeoutError as error:
            raise ConnectTimeoutError("connecting timed out") from error
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise ConnectFailedError(error.errno, reason) from error
        return connection


class EngineConnection(asyncio.Protocol):
    """One connection; one request and its answer at a time."""

    def __init__(self, idle: list[EngineConnection]) -> None:
        self._idle = idle
        self._transport: Any = None
        self.idle_since = 0.0
        self._begin()

    def _begin(self) -> None:
        """What belongs to one answer."""
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._num_unread = 0
        self._num_header_bytes = 0
        self._is_paused = False
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._has_head = False
        self._has_length = False  # without one, the answer ends with the connection
        self._is_complete = False
        self._can_be_kept = False
        self.status = 0
        self.content_type = ""

    def send(self, request: bytes) -> None:
        self._transport.write(request)

    async def head(self) -> None:
        """Until status and headers are here."""
        while not self._has_head:
            await self._more()

    async def readany(self) -> bytes:
        """What came since the last call, at least a byte; b"" at the answer's end."""
        while not self._parts:
            if self._is_complete:
                return b""
            await self._more()
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._num_unread = 0
        if self._is_paused:
            self._is_paused = False
            self._transport.resume_reading()
        return data

    async def read(self) -> bytes:
        """The rest of the body."""
        parts = []
        while part := await self.readany():
            parts.append(part)
        return b"".join(parts)

    def release(self) -> None:
        """Keeps the connection if the answer was complete, closes it otherwise."""
        if not self._is_complete or not self._can_be_kept or self._error or self._transport.is_closing():
            self.abort()
            return
        if self._is_paused:
            self._transport.resume_reading()
        self._begin()
        self.idle_since = asyncio.get_running_loop().time()
        self._idle.append(self)

    def abort(self) -> None:
        self._transport.abort()

    async def _more(self) -> None:
        """Until something came, or raises what went wrong."""
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(self._error)

    # asyncio.Protocol

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self._idle:
            self._idle.remove(self)
        elif self._has_head and not self._has_length and exc is None:
            self._is_complete = True
            self._wake()
        elif not self._is_complete:
            self._fail(ConnectionBrokenError("the connection broke before the answer's end"))

    def data_received(self, data: bytes) -> None:
        if not self._has_head:
            self._num_header_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(NotHttpError(str(error)))
            self.abort()
            return
        if not self._has_head and self._num_header_bytes > MAX_HEADER_BYTES:
            self._fail(NotHttpError(f"more than {MAX_HEADER_BYTES} bytes of headers"))
            self.abort()
            return
        self._wake()

    # httptools' callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name in (b"content-length", b"transfer-encoding"):
            self._has_length = True
        elif name == b"content-type":
            self.content_type = value.partition(b";")[0].strip().lower().decode("latin-1")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200:  # one below announces the answer
            self.status, self._has_head = status, True

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)
        self._num_unread += len(body)
        if self._num_unread > MAX_UNREAD_BYTES and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        if self._has_head:
            self._can_be_kept = self._parser.should_keep_alive()
            self._is_complete = True


def _header_lines(headers: dict[str, str]) -> bytes:
    """Raises ValueError for a value that would end its line."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if lines.count("\n") != len(headers) or lines.count("\r") != len(headers):
        raise ValueError("a header holds a line break")
    return lines.encode("latin-1")
