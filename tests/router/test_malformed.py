"""10,000 malformed requests: each gets an answer that is not a 500, none hangs, and nothing of them stays."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import orjson
import pytest

from tests.router.answers import answer_any
from tests.router.conftest import StartStack
from tests.router.malformed import Case, cases
from tests.router.running import wait_for

COUNT = 10_000
SEED = 20261121
AT_ONCE = 32
PATIENCE = 20.0  # s for an answer that must come
SILENCE = 1.5  # s after which an answer that need not come is not waited for; longer than the router waits for a body
RIGHT = {200, 400, 404, 405, 408, 413, 415, 431}


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def read_answer(reader: asyncio.StreamReader, is_head: bool) -> tuple[int, bytes]:
    """Status and body of one answer."""
    status = 100
    while status < 200:  # after "100 continue" comes another
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        status = int(head.split(b" ", 2)[1])
    if is_head:
        return status, b""
    if b"transfer-encoding: chunked" in head:
        return status, await reader.readuntil(b"\r\n0\r\n\r\n")
    return status, await reader.readexactly(int(head.partition(b"content-length: ")[2].split(b"\r\n")[0]))


async def send(port: int, case: Case) -> int | str:
    """The status of the answer, or what came in its place."""
    async with connected(port) as (reader, writer):
        writer.write(case.raw)
        if case.hangs_up:
            await writer.drain()
            return "hung up"
        try:
            async with asyncio.timeout(PATIENCE if case.must_answer else SILENCE):
                status, body = await read_answer(reader, case.raw.startswith(b"HEAD "))
        except TimeoutError:
            return "silence"
        except (asyncio.IncompleteReadError, ConnectionError):
            return "closed"
    if status >= 400 and body:
        assert orjson.loads(body)["error"]["message"], case
    return status


async def send_all(port: int) -> Counter[tuple[str, int | str]]:
    ends: Counter[tuple[str, int | str]] = Counter()
    waiting: Iterator[Case] = cases(SEED, COUNT)

    async def work() -> None:
        for case in waiting:
            end = await send(port, case)
            assert end in RIGHT or (not case.must_answer and isinstance(end, str)), (end, case)
            ends[case.kind, end] += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(work())
    return ends


@pytest.mark.timeout(300)
def test_malformed_requests(start_stack: StartStack, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    stack = start_stack(body_timeout=1.0, record_transfers=False)
    stack.decode[0].behaviour = answer_any
    ends = asyncio.run(send_all(stack.router.port))
    assert ends.total() == COUNT
    answered = Counter[int | str]()
    for (_, end), number in ends.items():
        answered[end] += number
    assert answered[400] > COUNT / 2, ends
    assert answered[200] > COUNT / 50, ends  # some of them are harmless, and must not be refused
    ours = [record for record in caplog.records if record.name.partition(".")[0] in ("router", "uvicorn", "asyncio")]
    assert not ours, ours
    assert stack.router.complete().status == 200
    wait_for(stack.router.is_idle)
    wait_for(lambda: not stack.router.server.server_state.tasks and not stack.router.server.server_state.connections)
