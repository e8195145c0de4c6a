"""The client against a server that writes what a test tells it to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import uvloop

from router.engine_client import (
    MAX_UNREAD_BYTES,
    ConnectFailedError,
    ConnectionBrokenError,
    ConnectTimeoutError,
    EngineClient,
    NotHttpError,
)
from services.vllm_server import free_port

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: 2\r\n\r\n{}"
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class Server:
    """Runs `answer` for each request; `requests` are those that came, `num_connections` how many it accepted."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.requests: list[bytes] = []
        self.num_connections = 0
        self.has_request = asyncio.Event()
        self.hung_up = asyncio.Event()
        self.origin = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                self.requests.append(head + await reader.readexactly(length))
                self.has_request.set()
                await self._answer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.hung_up.set()
        finally:
            writer.close()


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[tuple[Server, EngineClient]]:
    server = Server(answer)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.origin = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    client = EngineClient(5.0, {"Accept-Encoding": "identity"})
    try:
        yield server, client
    finally:
        client.close()
        listener.close()
        await asyncio.sleep(0.05)  # for the last connections to close on both sides


def writing(*pieces: bytes, then_close: bool = False) -> Answer:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)
        if then_close:
            writer.close()
            raise ConnectionError

    return answer


async def post(server: Server, client: EngineClient) -> tuple[int, str, bytes]:
    async with asyncio.timeout(10):
        async with await client.post(server.origin, "/v1/completions", {"X-Request-Id": "a"}, b"{}") as response:
            return response.status, response.content_type, await response.read()


def test_one_connection_serves_one_request_after_the_other() -> None:
    async def run() -> None:
        async with serving(writing(OK)) as (server, client):
            for _ in range(3):
                assert await post(server, client) == (200, "application/json", b"{}")
            assert server.num_connections == 1
            head, _, body = server.requests[0].partition(b"\r\n\r\n")
            lines = head.split(b"\r\n")
            assert lines[0] == b"POST /v1/completions HTTP/1.1" and body == b"{}"
            assert {b"Accept-Encoding: identity", b"X-Request-Id: a", b"Content-Length: 2"} <= set(lines)
            assert b"Host: " + server.origin.removeprefix("http://").encode() in lines

    uvloop.run(run())


def test_a_stream_comes_as_it_is_written() -> None:
    async def run() -> None:
        async with serving(writing(STREAM, b"3\r\nabc\r\n", b"2\r\nde\r\n", b"0\r\n\r\n")) as (server, client):
            response = await client.post(server.origin, "/x", {}, b"")
            assert [await response.content.readany() for _ in range(3)] == [b"abc", b"de", b""]
            response.close()
            response.close()  # twice is once
            await post(server, client)
            assert server.num_connections == 1

    uvloop.run(run())


def test_closing_before_the_end_hangs_up() -> None:
    async def run() -> None:
        async with serving(writing(STREAM, b"3\r\nabc\r\n")) as (server, client):
            response = await client.post(server.origin, "/x", {}, b"")
            assert await response.content.readany() == b"abc"
            response.close()
            async with asyncio.timeout(5):
                await server.hung_up.wait()

    uvloop.run(run())


def test_cancelling_while_the_engine_works_hangs_up() -> None:
    async def run() -> None:
        async with serving(writing()) as (server, client):
            task = asyncio.create_task(client.post(server.origin, "/x", {}, b""))
            async with asyncio.timeout(5):
                await server.has_request.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            async with asyncio.timeout(5):
                await server.hung_up.wait()

    uvloop.run(run())


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ((), ConnectionBrokenError),
        ((b"HTTP/1.1 200 OK\r\nContent-Le",), ConnectionBrokenError),
        ((OK[:-1],), ConnectionBrokenError),
        ((STREAM, b"3\r\nabc\r\n"), ConnectionBrokenError),
        ((b"hello\r\n\r\n",), NotHttpError),
        ((b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000,), NotHttpError),
        ((STREAM, b"zz\r\n"), NotHttpError),
    ],
)
def test_an_answer_that_is_none_is_an_error(pieces: tuple[bytes, ...], error: type[Exception]) -> None:
    async def run() -> None:
        async with serving(writing(*pieces, then_close=True)) as (server, client):
            with pytest.raises(error):
                await post(server, client)

    uvloop.run(run())


def test_an_answer_without_length_ends_with_the_connection() -> None:
    async def run() -> None:
        answer = writing(
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 Busy\r\nContent-Type: text/plain\r\n\r\nno", then_close=True
        )
        async with serving(answer) as (server, client):
            assert await post(server, client) == (503, "text/plain", b"no")
            assert await post(server, client) == (503, "text/plain", b"no")
            assert server.num_connections == 2

    uvloop.run(run())


def test_an_answer_that_nobody_reads_makes_the_engine_wait() -> None:
    num_written = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_written
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (200 * 2**20))
        for _ in range(200):
            writer.write(bytes(2**20))
            await writer.drain()
            num_written += 2**20

    async def run() -> None:
        async with serving(flood) as (server, client):
            response = await client.post(server.origin, "/x", {}, b"")
            await asyncio.sleep(0.3)
            stopped_at = num_written
            await asyncio.sleep(0.3)
            assert num_written == stopped_at < 100 * 2**20, "the engine should have been made to wait"
            first = await response.content.readany()
            assert MAX_UNREAD_BYTES <= len(first) < 4 * MAX_UNREAD_BYTES
            num_read = len(first)
            while part := await response.content.readany():
                num_read += len(part)
            assert num_read == 200 * 2**20
            response.close()

    uvloop.run(run())


def test_a_refused_connection_and_one_that_takes_too_long() -> None:
    async def run() -> None:
        with pytest.raises(ConnectFailedError) as caught:
            await EngineClient(5.0).post(f"http://127.0.0.1:{free_port()}", "/", {}, b"")
        assert "refused" in str(caught.value.strerror).lower()
        async with serving(writing(OK)) as (server, _):
            with pytest.raises(ConnectTimeoutError):
                await EngineClient(1e-9).post(server.origin, "/", {}, b"")

    uvloop.run(run())


def test_idle_connections_that_the_engine_closed_are_not_used_again() -> None:
    async def run() -> None:
        async with serving(writing(OK, then_close=True)) as (server, client):
            for _ in range(3):
                await post(server, client)
                await asyncio.sleep(0.05)
            assert server.num_connections == 3

    uvloop.run(run())


def test_a_header_with_a_line_break_is_refused() -> None:
    async def run() -> None:
        async with serving(writing(OK)) as (server, client):
            with pytest.raises(ValueError, match="line break"):
                await client.post(server.origin, "/", {"traceparent": "a\r\nX-Evil: b"}, b"")

    uvloop.run(run())
