"""A body taken from aiohttp packet by packet, and what becomes of its connection."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from router.tap import Take, pump

PIECES = [b"%d " % i * 50 for i in range(40)]
Check = Callable[[aiohttp.ClientSession, str], Awaitable[None]]


def into(pieces: list[bytes], chunks: list[bytes] | None = None) -> Take:
    def take(piece: bytes, chunk: bytes | None) -> None:
        pieces.append(piece)
        if chunks is not None and chunk is not None:
            chunks.append(chunk)

    return take


def with_server(check: Check, breaks_off: bool = False) -> None:
    """Runs `check` against a server that streams PIECES, one packet each."""

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"X-Port": str(request.transport.get_extra_info("peername")[1])})  # type: ignore[union-attr]
        await response.prepare(request)
        for piece in PIECES:
            await response.write(piece)
            await asyncio.sleep(0.002)
        if breaks_off:
            request.transport.abort()  # type: ignore[union-attr]
        return response

    async def run() -> None:
        app = web.Application()
        app.router.add_get("/", stream)
        runner = web.AppRunner(app, shutdown_timeout=0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            async with aiohttp.ClientSession() as session:
                await check(session, f"http://127.0.0.1:{runner.addresses[0][1]}/")
        finally:
            await runner.cleanup()

    asyncio.run(run())


def test_everything_comes_in_order_and_the_connection_serves_the_next_request() -> None:
    async def check(session: aiohttp.ClientSession, url: str) -> None:
        ports = set()
        for _ in range(3):
            got: list[bytes] = []
            async with session.get(url) as response:
                await pump(response, into(got))
                ports.add(response.headers["X-Port"])
            assert b"".join(got) == b"".join(PIECES)
            assert len(got) > len(PIECES) // 2, "pieces are to come one by one"
        assert len(ports) == 1, "each stream should have come over the same connection"

    with_server(check)


def test_nothing_more_is_taken_while_a_piece_is_awaited() -> None:
    async def check(session: aiohttp.ClientSession, url: str) -> None:
        got: list[bytes] = []
        is_busy = False

        def take(piece: bytes, _: bytes | None) -> Coroutine[Any, Any, None] | None:
            assert not is_busy
            got.append(piece)
            return rest() if len(got) % 3 == 0 else None

        async def rest() -> None:
            nonlocal is_busy
            is_busy = True
            await asyncio.sleep(0.01)
            is_busy = False

        async with session.get(url) as response:
            await pump(response, take)
        assert b"".join(got) == b"".join(PIECES)

    with_server(check)


def test_what_taking_raises_is_raised_where_the_body_is_awaited() -> None:
    async def check(session: aiohttp.ClientSession, url: str) -> None:
        def take(piece: bytes, _: bytes | None) -> None:
            raise ValueError("no")

        async with session.get(url) as response:
            with pytest.raises(ValueError, match="no"):
                await pump(response, take)

    with_server(check)


def test_a_body_that_breaks_off_is_an_error() -> None:
    async def check(session: aiohttp.ClientSession, url: str) -> None:
        got: list[bytes] = []
        async with session.get(url) as response:
            with pytest.raises(aiohttp.ClientPayloadError):
                await pump(response, into(got))
        assert got[0].startswith(PIECES[0])

    with_server(check, breaks_off=True)


def test_a_cancelled_stream_leaves_nothing_behind() -> None:
    async def check(session: aiohttp.ClientSession, url: str) -> None:
        got: list[bytes] = []
        has_begun = asyncio.Event()

        def take(piece: bytes, _: bytes | None) -> None:
            got.append(piece)
            has_begun.set()

        async def read() -> None:
            async with session.get(url) as response:
                await pump(response, take)

        task = asyncio.create_task(read())
        await has_begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        num_pieces = len(got)
        await asyncio.sleep(0.05)
        assert len(got) == num_pieces
        async with session.get(url) as response:
            assert await response.read() == b"".join(PIECES)

    with_server(check)


def chunk(piece: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(piece), piece)


def test_chunks_that_aiohttp_does_not_see_leave_its_parser_where_it_was() -> None:
    pieces = [b"piece %d\n" % number for number in range(12)]
    whole = [chunk(piece) for piece in pieces]
    inner = chunk(b"a" * 5)  # the rest of a chunk that looks like a chunk
    packets = [
        *whole[:4],
        whole[4][:7],
        whole[4][7:],
        *whole[5:7],
        whole[7] + whole[8],
        b"%x\r\nb" % (1 + len(inner)),
        inner,
        b"\r\n",
        *whole[9:],
        b"0\r\n\r\n",
    ]
    body = b"".join((*pieces[:9], b"b", inner, *pieces[9:]))
    ports: set[int] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                ports.add(writer.get_extra_info("peername")[1])
                writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
                for packet in packets:
                    await asyncio.sleep(0.005)
                    writer.write(packet)
        writer.close()

    async def run() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server, aiohttp.ClientSession() as session:
            for _ in range(2):
                got: list[bytes] = []
                chunks: list[bytes] = []
                async with session.get(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/") as response:
                    await pump(response, into(got, chunks))
                assert b"".join(got) == body
                assert len(chunks) >= 7 and set(chunks) <= set(map(chunk, got))
        assert len(ports) == 1, "aiohttp did not see the end of the body"

    asyncio.run(asyncio.wait_for(run(), 20))
