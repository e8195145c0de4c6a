"""A body's bytes as they come in, without a future, a task switch or a timer for each packet.

aiohttp's reader wakes a task for every packet, which runs through every coroutine that it stands in. So while a body
streams, `_Tap` stands between the connection's transport and aiohttp's own protocol. That one parses packets as ever
and keeps the connection's state; what it parsed is then read at once. Only a packet that is one whole chunk of a
chunked body, which is how an engine sends a token, is not shown to it: between two chunks its parser waits for the next
one's size, and whether it gets that one or a later one is all the same to it (RFC 9112, section 7.1).
All of it is public: `transport.set_protocol` (asyncio), `ClientResponse.connection` and `StreamReader.read_nowait`
(aiohttp). Without a connection to stand in, the body is read as usual. The session must not have a `sock_read` timeout,
which would not hear of chunks that go by.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import aiohttp

Wait = Coroutine[Any, Any, None]
Take = Callable[[bytes, bytes | None], Wait | None]
"""Takes one piece, and the chunk that it came in if that is all of the chunk: its size, the piece, and both line ends.
What it returns must be awaited before it can take the next one; None if it can at once."""


MAX_SIZE_DIGITS = 10  # of a chunk, with its line end: more than 16 MiB a packet never has


async def pump(response: aiohttp.ClientResponse, take: Take) -> None:
    """Gives `take` the body, piece by piece. Raises what aiohttp raises, and what `take` does.

    While a piece is awaited nothing is read, and aiohttp's flow control holds the sender up.
    """
    content = response.content
    while not content.at_eof():
        connection = response.connection  # None as soon as all of the body is here
        if connection is None or connection.transport is None or connection.protocol is None:
            data = await content.readany()
            waits = take(data, None) if data else None
        else:
            waits = await _Tap(connection.transport, connection.protocol, content, take).run()
        if waits is not None:
            await waits


class _Tap(asyncio.Protocol):
    """Lives until the body's end, or until `take` wants something awaited."""

    def __init__(
        self, transport: asyncio.Transport, inner: asyncio.Protocol, content: aiohttp.StreamReader, take: Take
    ) -> None:
        self._transport = transport
        self._inner = inner
        self._feed = inner.data_received
        self._content = content
        self._read = content.read_nowait
        self._take = take
        self._is_between = False  # aiohttp's parser is known to wait for a chunk's size
        self._ended: asyncio.Future[Wait | None] = asyncio.get_running_loop().create_future()

    async def run(self) -> Wait | None:
        """What must be awaited before the next piece; None at the end of the body."""
        self._transport.set_protocol(self)
        try:
            self._pass_on(b"")  # what came before
            return await self._ended
        except asyncio.CancelledError:
            if not self._ended.cancelled() and (waits := self._ended.result()) is not None:
                waits.close()  # it came together with the cancellation, and nobody will await it
            raise
        finally:
            self._step_aside()

    def data_received(self, data: bytes) -> None:
        if self._is_between and not self._ended.done():
            begin = data.find(b"\r\n", 0, MAX_SIZE_DIGITS) + 2
            size = len(data) - begin - 2
            if size > 0 and data.startswith(b"%x\r\n" % size) and data.endswith(b"\r\n"):
                try:
                    waits = self._take(data[begin:-2], data)
                except Exception as error:  # noqa: BLE001 raised again where the body is awaited
                    self._fail(error)
                    return
                if waits is not None:
                    self._end(waits)
                return
        self._feed(data)
        if not self._ended.done():  # it is when this stream was cancelled, and its task has not run yet
            self._pass_on(data)

    def _pass_on(self, data: bytes) -> None:
        """What aiohttp made of `data`, and of what came before it."""
        try:
            piece = self._read()
            # It took the chunk's size for that, so it stood before a chunk, and does again.
            self._is_between = bool(piece) and data == b"%x\r\n%b\r\n" % (len(piece), piece)
            waits = self._take(piece, data if self._is_between else None) if piece else None
        except Exception as error:  # noqa: BLE001 raised again where the body is awaited
            self._fail(error)
            return
        if waits is not None or self._content.is_eof():
            self._end(waits)

    def _end(self, waits: Wait | None) -> None:
        # Before anything else runs: the connection may be in the pool again, for the next request.
        self._step_aside()
        self._ended.set_result(waits)

    def _fail(self, error: Exception) -> None:
        self._step_aside()
        self._ended.set_exception(error)

    def _step_aside(self) -> None:
        self._transport.set_protocol(self._inner)

    # The rest of a protocol is aiohttp's own.

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._inner.connection_lost(exc)
        if not self._ended.done():
            self._pass_on(b"")  # the reader has its end now, or the exception that says why there is none

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()
