from __future__ import annotations

import asyncio
import gc
from collections import Counter
from typing import Any

import aiohttp
import pytest

from router.handoff import Handoff
from tests.router.conftest import StartStack
from tests.router.running import wait_for
from tests.router.scripted_engine import MODEL, NUM_CHUNKS, chunk, hang_up, raw_stream

NUM_STREAMS = 200
BODY = {"model": MODEL, "prompt": "hi", "stream": True}


async def stream_all(url: str, count: int) -> list[bytes]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one(index: int) -> bytes:
            headers = {"X-Request-Id": f"r{index}"}
            async with session.post(f"{url}/v1/completions", json=BODY, headers=headers) as response:
                assert response.headers["x-request-id"] == f"r{index}"
                return await response.read()

        return await asyncio.gather(*(one(index) for index in range(count)))


def test_200_streams_at_once(start_stack: StartStack) -> None:
    stack = start_stack(num_prefill=2, num_decode=2)
    pieces = [chunk(i) for i in range(20)] + [b"data: [DONE]\n\n"]
    for engine in stack.decode:
        engine.behaviour = raw_stream(*pieces, then="end", pause=0.02)
    bodies = asyncio.run(stream_all(stack.router.url, NUM_STREAMS))
    assert set(bodies) == {b"".join(pieces)}
    for pool in (stack.prefill, stack.decode):
        shares = [len(engine.seen) for engine in pool]
        assert sum(shares) == NUM_STREAMS
        assert min(shares) > 0.4 * NUM_STREAMS  # least loaded spreads them
    for engine in stack.decode:  # no request got another one's KV cache
        for seen in engine.seen:
            assert seen.body["kv_transfer_params"]["tknp_request_id"] == seen.headers["x-request-id"]
    wait_for(stack.router.is_idle)


def test_an_engine_that_dies_under_load_loses_no_request(start_stack: StartStack) -> None:
    stack = start_stack(num_prefill=2, num_decode=2)
    stack.prefill[0].behaviour = hang_up
    stack.decode[1].behaviour = hang_up
    bodies = asyncio.run(stream_all(stack.router.url, 60))
    whole = b"".join(chunk(i) for i in range(NUM_CHUNKS)) + b"data: [DONE]\n\n"
    assert Counter(bodies) == {whole: 60}
    wait_for(stack.router.is_idle)


@pytest.mark.parametrize(
    "fields",
    [
        {"stream": True},
        {"stream": True, "seed": 1},  # which another engine could not go on with
        {"stream": True, "n": 2},
        {"stream": True, "echo": True},  # prefilled where it is decoded
        {"stream": False},
        {"stream": False, "user": "u"},
    ],
    ids=lambda fields: " ".join(fields),
)
def test_a_request_leaves_nothing_for_the_garbage_collector(start_stack: StartStack, fields: dict[str, Any]) -> None:
    stack = start_stack()
    assert stack.router.complete(**fields).status == 200
    wait_for(stack.router.is_idle)
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            assert stack.router.complete(**fields).status == 200
        wait_for(stack.router.is_idle)
        wait_for(lambda: not any(type(known) is Handoff for known in gc.get_objects()))
    finally:
        gc.enable()
