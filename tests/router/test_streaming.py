"""Both legs of a request at once (router.streaming)."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest
from aiohttp import web

from router.handoff import Handoff
from router.streaming import run_both
from tests.router.conftest import Stack, StartStack
from tests.router.running import wait_for
from tests.router.scripted_engine import (
    KV_PARAMS,
    Behaviour,
    ScriptedEngine,
    Seen,
    answer_decode,
    answer_prefill,
    hang_up,
    raw_stream,
    slow,
    stall,
    status,
)
from tests.router.test_introductions import PEER
from tests.router.test_leases import lease_of
from tests.router.test_room import rooms
from tests.router.test_room import status as room


def after(prefill: ScriptedEngine, then: Behaviour = answer_decode) -> Behaviour:
    """A decode engine's answer, which can't come before the prefill engine's."""

    async def answer(engine: ScriptedEngine, request: web.Request, seen: Seen) -> web.StreamResponse:
        while len(prefill.seen) < len(engine.seen) or not all(one.ended.is_set() for one in prefill.seen):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.05)
        return await then(engine, request, seen)

    return answer


def params(engine: ScriptedEngine, index: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = engine.seen[index].body["kv_transfer_params"]
    return found


@pytest.fixture
def start_streaming(start_stack: StartStack) -> StartStack:
    def start(**settings: Any) -> Stack:
        settings = {"stream_kv": True, "kv_poll_interval": 0.05, **settings}
        stack = start_stack(kv_peer={**PEER, "streams": True}, **settings)
        for engine in stack.decode:
            engine.ranks = [room(0, 100)]  # of 100 blocks of 16 tokens
        pairs = len(stack.prefill) * len(stack.decode)
        wait_for(lambda: len(stack.router.state.fleet.introductions._peers) == pairs)
        wait_for(lambda: rooms(stack) == [[1600]] * len(stack.decode))
        return stack

    return start


def test_the_decode_leg_does_not_wait_for_the_prefill_leg(start_streaming: StartStack) -> None:
    stack = start_streaming()
    prefill, decode = stack.prefill[0], stack.decode[0]
    prefill.behaviour, decode.behaviour = slow(0.5), after(prefill)
    raw = stack.router.open_stream()
    wait_for(lambda: decode.seen)
    assert not prefill.seen[0].ended.is_set()
    answer = b""
    while b"[DONE]" not in answer:
        answer += raw.recv(4096)
    raw.close()
    assert params(prefill)["tknp_stream"] is True
    told = params(decode)
    assert told["tknp_stream"] == lease_of(prefill)
    assert told["do_remote_prefill"] is True
    assert [told[f"remote_{name}"] for name in ("engine_id", "host", "port")] == ["one", "127.0.0.1", PEER["port"]]
    wait_for(stack.router.is_idle)
    answer_whole = stack.router.complete()
    assert answer_whole.status == 200
    moments = list(stack.router.record(answer_whole)["moments"])
    assert moments.index("prefill_sent") < moments.index("prefill_done") < moments.index("decode_sent")
    assert prefill.released == decode.aborted == []


def test_only_where_it_is_wanted_and_possible(start_streaming: StartStack, start_stack: StartStack) -> None:
    stack = start_streaming()
    assert stack.router.complete(n=2).status == 200
    assert params(stack.decode[0])["remote_engine_id"] == "p0", "several sequences read one offer"
    for stock in (start_stack(stream_kv=True), start_streaming(stream_kv=False)):
        assert stock.router.complete().status == 200
        assert "tknp_stream" not in {**params(stock.prefill[0]), **params(stock.decode[0])}


def test_not_where_the_blocks_that_it_takes_may_be_needed_sooner(start_streaming: StartStack) -> None:
    stack = start_streaming(stream_kv_spare=0.5)
    prefill, decode = stack.prefill[0], stack.decode[0]
    decode.ranks = [room(0, 60), room(1, 10)]
    wait_for(lambda: rooms(stack) == [[960, 160]])

    def is_streamed(num_tokens: int) -> bool:
        assert stack.router.complete(prompt=[1] * num_tokens, max_tokens=500).status == 200
        return "tknp_stream" in params(decode, -1)

    # Of the 160 tokens that can be spared; until the next poll, rooms are right up to a block.
    assert is_streamed(140) and not is_streamed(180)
    num_seen = len(prefill.seen)
    prefill.behaviour = stall  # for one that needs room later, as it is too long to be streamed
    other = stack.router.open_stream(prompt=[1] * 161, max_tokens=500)
    wait_for(lambda: len(prefill.seen) > num_seen)
    assert stack.router.state.pool.engines[0].load.num_tokens == 161
    prefill.behaviour = answer_prefill
    decode.ranks = [room(0, 70), room(1, 10)]
    wait_for(lambda: rooms(stack) == [[1120, 160]])
    assert is_streamed(140) and not is_streamed(180), "320 can be spared, of which the other counts 161"
    other.close()


def test_not_to_an_engine_whose_room_is_not_known(start_streaming: StartStack) -> None:
    stack = start_streaming()
    stack.decode[0].ranks = []
    wait_for(lambda: rooms(stack) == [None])
    assert stack.router.complete().status == 200
    assert "tknp_stream" not in params(stack.decode[0])


@pytest.mark.parametrize("stream", [False, True])
def test_a_whole_answer_does_not_wait_for_the_prefill_leg(start_streaming: StartStack, stream: bool) -> None:
    stack = start_streaming()
    prefill = stack.prefill[0]
    prefill.behaviour = stall
    raw = stack.router.open_stream(stream=stream)
    answer = b""
    while b"[DONE]" not in answer and not (answer.endswith(b"}") and not stream):
        answer += raw.recv(4096)
    raw.close()  # which is no hang-up: the client has all that it asked for
    assert prefill.seen[0].cancelled.wait(10)
    wait_for(stack.router.is_idle)
    ((_, record),) = stack.router.state.records._finished.items()
    assert record.as_dict()["outcome"] == "ok"


USAGE = b'{"choices":[],"usage":{"prompt_tokens_details":{"cached_tokens":700}}}'


def late(pause: float, *told: Any) -> Behaviour:
    """A prefill engine's answers, each with what it says it had cached."""

    async def answer(engine: ScriptedEngine, request: web.Request, seen: Seen) -> web.StreamResponse:
        cached = told[min(len(engine.seen), len(told)) - 1]
        params = KV_PARAMS if cached is None else {**KV_PARAMS, "remote_prefill_cached_tokens": cached}
        await asyncio.sleep(pause)
        return web.json_response({"kv_transfer_params": params})

    return answer


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("pause", [0.0, 0.2])
def test_usage_says_what_the_prefill_engine_had_cached(start_streaming: StartStack, stream: bool, pause: float) -> None:
    stack = start_streaming()
    events = raw_stream(b"data: {}\n\n", b"data: " + USAGE + b"\n\n", b"data: [DONE]\n\n", then="end")
    stack.prefill[0].behaviour = late(pause, 48, None, "48")
    stack.decode[0].behaviour = events if stream else status(200, USAGE)
    for expected in (b'"cached_tokens":48}', b'"cached_tokens":700}', b'"cached_tokens":700}'):
        answer = stack.router.complete(stream=stream)
        assert answer.status == 200 and expected in answer.body


def test_usage_says_nothing_of_a_prefill_engine_before(start_streaming: StartStack) -> None:
    stack = start_streaming(num_decode=2, num_retries=1)
    prefill = stack.prefill[0]
    prefill.behaviour = late(0.0, 48, None)

    async def die_once(engine: ScriptedEngine, request: web.Request, seen: Seen) -> web.StreamResponse:
        while not prefill.seen[-1].ended.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        return await (hang_up if len(prefill.seen) == 1 else status(200, USAGE))(engine, request, seen)

    for engine in stack.decode:
        engine.behaviour = die_once
    answer = stack.router.complete()
    assert answer.status == 200 and b'"cached_tokens":700}' in answer.body
    assert len(prefill.seen) == 2


def test_a_prefill_leg_that_fails_ends_the_decode_leg_and_is_tried_again(start_streaming: StartStack) -> None:
    stack = start_streaming(num_prefill=2)
    decode = stack.decode[0]
    hung_up: list[ScriptedEngine] = []

    async def fail_once(engine: ScriptedEngine, request: web.Request, seen: Seen) -> web.StreamResponse:
        await asyncio.sleep(0.2)
        if hung_up:
            return await answer_prefill(engine, request, seen)
        hung_up.append(engine)
        return await hang_up(engine, request, seen)

    async def first_stalls(engine: ScriptedEngine, request: web.Request, seen: Seen) -> web.StreamResponse:
        return await (stall if len(engine.seen) == 1 else answer_decode)(engine, request, seen)

    for engine in stack.prefill:
        engine.behaviour = fail_once
    decode.behaviour = first_stalls
    assert stack.router.complete().status == 200
    assert decode.seen[0].cancelled.wait(10)
    first, second = sorted(stack.prefill, key=lambda engine: engine not in hung_up)
    assert [params(decode, i)["tknp_stream"] for i in (0, 1)] == [lease_of(first), lease_of(second)]
    assert first.released == [lease_of(first)] and second.released == []
    assert decode.aborted == [first.seen[0].headers["x-request-id"]]


def test_a_prefill_engine_s_refusal_ends_both(start_streaming: StartStack) -> None:
    stack = start_streaming()
    stack.prefill[0].behaviour, stack.decode[0].behaviour = status(400), stall
    assert stack.router.complete().status == 400
    assert not stack.decode[0].seen or stack.decode[0].seen[0].cancelled.wait(10)


def test_a_decode_engine_s_refusal_ends_both_and_releases(start_streaming: StartStack) -> None:
    stack = start_streaming()
    prefill = stack.prefill[0]
    prefill.behaviour, stack.decode[0].behaviour = stall, status(422)
    assert stack.router.complete().status == 422
    wait_for(lambda: prefill.released)
    assert not prefill.seen or prefill.seen[0].cancelled.wait(10)


def test_a_decode_engine_that_was_not_reached_leaves_the_prefill_to_the_next(start_streaming: StartStack) -> None:
    stack = start_streaming(num_decode=2, num_retries=1, health_check_interval=2.0)
    prefill, (gone, left) = stack.prefill[0], stack.decode
    prefill.behaviour = slow(0.2)
    gone.kill()
    for _ in range(20):  # until one is sent to the engine that is gone
        assert stack.router.complete().status == 200
        if any(params(left, i)["remote_engine_id"] == KV_PARAMS["remote_engine_id"] for i in range(len(left.seen))):
            break
    else:
        pytest.fail("no request went on with the KV cache that was there")
    assert len(prefill.seen) == len(left.seen), "none was computed twice"


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_hang_up_ends_both_legs_and_releases(start_streaming: StartStack, phase: str) -> None:
    stack = start_streaming()
    prefill, decode = stack.prefill[0], stack.decode[0]
    prefill.behaviour, decode.behaviour = (stall if phase == "prefill" else answer_prefill), stall
    raw = stack.router.open_stream()
    wait_for(lambda: prefill.seen and decode.seen)
    if phase == "decode":
        assert prefill.seen[0].ended.wait(10)
    raw.close()
    wait_for(lambda: prefill.released)
    assert prefill.released == [lease_of(prefill)]
    assert decode.aborted == [prefill.seen[0].headers["x-request-id"]]
    assert decode.seen[0].cancelled.wait(10)
    if phase == "prefill":
        assert prefill.seen[0].cancelled.wait(10)
    wait_for(stack.router.is_idle)


def test_an_answer_that_has_begun_needs_no_prefill_leg_any_more(start_streaming: StartStack) -> None:
    stack = start_streaming(num_retries=0)
    prefill, decode = stack.prefill[0], stack.decode[0]

    async def break_late(engine: ScriptedEngine, request: web.Request, seen: Seen) -> web.StreamResponse:
        await asyncio.sleep(0.3)
        return await hang_up(engine, request, seen)

    prefill.behaviour = break_late
    decode.behaviour = raw_stream(b"data: {}\n\n", b"data: {}\n\n", b"data: [DONE]\n\n", then="end", pause=0.3)
    answer = stack.router.complete(stream=True)
    assert answer.status == 200 and answer.body.endswith(b"data: [DONE]\n\n")
    assert prefill.seen[0].ended.is_set() and prefill.released == []


def test_the_next_request_of_a_connection_does_not_wait_for_the_prefill_leg_and_is_heard_to_hang_up(
    start_streaming: StartStack,
) -> None:
    stack = start_streaming()
    prefill, decode = stack.prefill[0], stack.decode[0]
    prefill.behaviour = stall
    raw = stack.router.open_stream()
    answer = b""
    while b"0\r\n\r\n" not in answer:
        answer += raw.recv(4096)
    prefill.behaviour, decode.behaviour = answer_prefill, stall
    stack.router.ask_stream(raw)
    wait_for(lambda: len(decode.seen) == 2)
    assert not prefill.seen[0].cancelled.is_set(), "the first still waits for its prefill leg"
    assert prefill.seen[0].cancelled.wait(10)
    raw.close()
    assert decode.seen[1].cancelled.wait(10)
    wait_for(stack.router.is_idle)


def test_nothing_is_left_running_however_often_it_is_cancelled() -> None:
    ended = []

    async def leg() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            try:
                await asyncio.sleep(0.5)
            finally:
                ended.append("leg")

    async def run() -> None:
        both = asyncio.create_task(run_both(leg(), leg(), lambda: False))
        for _ in range(2):
            await asyncio.sleep(0.05)
            both.cancel()
        with pytest.raises(asyncio.CancelledError):
            await both
        assert len(ended) == 2

    asyncio.run(run())


ENDS = {
    "answered": (answer_prefill, answer_decode),
    "refused": (status(400), stall),
    "failed": (hang_up, hang_up),
    "hung up": (stall, stall),
    "hung up in the stream": (answer_prefill, raw_stream(b"data: {}\n\n", then="stall")),
}


@pytest.mark.parametrize("end", ENDS)
def test_however_two_legs_end_the_garbage_collector_has_nothing_to_do(start_streaming: StartStack, end: str) -> None:
    stack = start_streaming(num_prefill=2, num_decode=2)
    for engines, behaviour in zip((stack.prefill, stack.decode), ENDS[end], strict=True):
        for engine in engines:
            engine.behaviour = behaviour

    def ask() -> None:
        num_seen = sum(len(engine.seen) for engine in stack.decode)
        if not end.startswith("hung up"):
            assert (stack.router.complete(stream=True).status == 200) is (end == "answered")
        else:
            raw = stack.router.open_stream()
            wait_for(lambda: sum(len(engine.seen) for engine in stack.decode) > num_seen)
            if end == "hung up in the stream":
                raw.recv(4096)
            raw.close()
        wait_for(stack.router.is_idle)

    ask()
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            ask()
        wait_for(lambda: not any(type(known) is Handoff for known in gc.get_objects()))
    finally:
        gc.enable()
