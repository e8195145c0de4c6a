"""The guard against silent wrong tokens, with engines that answer one thing with a hand-off and another without."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import orjson
import pytest
from aiohttp import web

from router.guard import MAX_BYTES, Tape, is_checkable
from router.types import Api
from router.validation import parse_request
from tests.router.conftest import Stack, StartStack
from tests.router.running import wait_for
from tests.router.scripted_engine import NUM_CHUNKS, Behaviour, ScriptedEngine, Seen, answer_prefill, stall, status

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 5}
RIGHT = [f"{i} " for i in range(NUM_CHUNKS)]


def alone(words: list[str], gap: float = 5.0, then: Behaviour = answer_prefill) -> Behaviour:
    """Answers a repeated request with these tokens, of which each has an alternative; everything else as `then`."""

    async def answer(engine: ScriptedEngine, request: web.Request, seen: Seen) -> web.StreamResponse:
        if "kv_transfer_params" in seen.body:
            return await then(engine, request, seen)
        text = "".join(words)
        top = [{"token": "?", "logprob": -1.0 - gap}]
        content = [{"token": word, "logprob": -1.0, "top_logprobs": top} for word in words]
        chat = {"message": {"content": text}, "logprobs": {"content": content}}
        plain = {
            "tokens": words,
            "token_logprobs": [-1.0] * len(words),
            "top_logprobs": [{word: -1.0, "?": -1.0 - gap} for word in words],
        }
        choice = chat if request.path == Api.CHAT else {"text": text, "logprobs": plain}
        return web.json_response({"choices": [choice]})

    return answer


def count(stack: Stack, result: str) -> float:
    return stack.router.metric("tknp_guard_requests_total", result=result)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_the_same_answer_is_equal(start_stack: StartStack, stream: bool, chat: bool) -> None:
    stack = start_stack(guard_share=1.0)
    stack.prefill[0].behaviour = alone(RIGHT)
    if chat:
        stack.decode[0].behaviour = chat_stream if stream else stack.decode[0].behaviour
        answer = stack.router.chat(stream=stream, **GREEDY)
    else:
        answer = stack.router.complete(stream=stream, seed=3, **GREEDY)
    wait_for(lambda: count(stack, "equal") == 1)
    assert stack.router.record(answer)["guard"] == "equal"
    _, again = stack.prefill[0].seen
    assert "kv_transfer_params" not in again.body
    assert again.headers["x-request-id"] == answer.headers["x-request-id"] + "-guard"
    assert again.body["cache_salt"] == "tknp-guard-" + answer.headers["x-request-id"]
    assert again.body["stream"] is False
    assert "seed" not in again.body


async def chat_stream(engine: ScriptedEngine, request: web.Request, seen: Seen) -> web.StreamResponse:
    events = [orjson.dumps({"choices": [{"index": 0, "delta": {"content": word}}]}) for word in RIGHT]
    body = b"".join(b"data: " + event + b"\n\n" for event in [*events, b"[DONE]"])
    return web.Response(body=body, content_type="text/event-stream")


def test_another_answer_is_counted_and_logged(start_stack: StartStack, caplog: pytest.LogCaptureFixture) -> None:
    stack = start_stack(guard_share=1.0)
    stack.prefill[0].behaviour = alone([*RIGHT[:3], "9 "])
    with caplog.at_level(logging.INFO, "router.guard"):
        answer = stack.router.complete({"X-Request-Id": "wrong"}, stream=True, **GREEDY)
        wait_for(lambda: count(stack, "different") == 1)
    assert answer.body.endswith(b"data: [DONE]\n\n")
    (line,) = [record for record in caplog.records if record.name == "router.guard"]
    assert line.levelno == logging.ERROR
    fields = line.fields  # type: ignore[attr-defined]
    assert {name: fields[name] for name in ("request_id", "position", "token")} == {
        "request_id": "wrong",
        "position": 6,
        "token": 3,
    }
    assert fields["gap"] == pytest.approx(5)


def test_a_tie_is_not_wrong(start_stack: StartStack) -> None:
    stack = start_stack(guard_share=1.0)
    stack.prefill[0].behaviour = alone([*RIGHT[:3], "9 "], gap=0.1)
    answer = stack.router.complete(**GREEDY)
    wait_for(lambda: count(stack, "tie") == 1)
    assert stack.router.record(answer)["guard"] == "tie"


@pytest.mark.parametrize("body", [b'{"choices":[]}', b'{"choices":[{"text":"x","logprobs":null}]}', b"<html>", None])
def test_no_second_answer_is_a_failure_of_the_guard_alone(start_stack: StartStack, body: bytes | None) -> None:
    stack = start_stack(guard_share=1.0)

    async def only_legs(engine: ScriptedEngine, request: web.Request, seen: Seen) -> web.StreamResponse:
        if "kv_transfer_params" in seen.body:
            return await answer_prefill(engine, request, seen)
        return await status(503 if body is None else 200, body or b"{}")(engine, request, seen)

    stack.prefill[0].behaviour = only_legs
    assert stack.router.complete(**GREEDY).status == 200
    wait_for(lambda: count(stack, "failed") == 1)
    wait_for(stack.router.is_idle)


def test_without_a_prefill_engine_another_decode_engine_answers(start_stack: StartStack) -> None:
    stack = start_stack(num_decode=2, guard_share=1.0)
    first, second = stack.decode
    for engine in (first, second):
        engine.behaviour = alone(RIGHT, then=engine.behaviour)
    stack.prefill[0].behaviour = one_leg_only
    answer = stack.router.complete(**GREEDY)
    wait_for(lambda: count(stack, "equal") == 1)
    assert answer.status == 200
    assert [len(first.seen), len(second.seen)] == [1, 1], "the engine that answered must not check itself"


async def one_leg_only(engine: ScriptedEngine, request: web.Request, seen: Seen) -> web.StreamResponse:
    engine.health_status = 503
    answer = await answer_prefill(engine, request, seen)
    await asyncio.sleep(0.5)  # several health checks
    return answer


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 0, "n": 2},
        {"temperature": 0, "logit_bias": {"1": 5}},
        {"temperature": 0, "presence_penalty": 1},
        {"temperature": 0, "tools": [{"type": "function"}]},
        {"temperature": 0, "response_format": {"type": "json_object"}},
        {"temperature": 0, "echo": True},
        {"temperature": 0, "prompt": ["a", "b"]},
        {"temperature": 0, "unknown": 1},
    ],
)
def test_only_plain_greedy_requests_are_repeated(fields: dict[str, Any]) -> None:
    def parsed(body: dict[str, Any]) -> bool:
        return is_checkable(parse_request(Api.COMPLETIONS, orjson.dumps(body), "a"))

    body = {"model": "m", "prompt": "x"}
    assert parsed({**body, "temperature": 0, "stream": True, "top_p": 1, "tools": None, "echo": False})
    assert not parsed({**body, **fields})


def test_nothing_is_kept_without_the_guard(stack: Stack) -> None:
    answer = stack.router.complete(**GREEDY)
    assert stack.router.record(answer)["guard"] is None
    assert len(stack.prefill[0].seen) == 1
    assert b"tknp_guard" not in stack.router.call("GET", "/metrics").body


def test_a_share_is_a_share(start_stack: StartStack) -> None:
    stack = start_stack(guard_share=0.5)
    stack.prefill[0].behaviour = alone(RIGHT)
    for _ in range(40):
        stack.router.complete(**GREEDY)
    legs = 40
    wait_for(lambda: len(stack.prefill[0].seen) == legs + count(stack, "equal"))
    assert 5 <= count(stack, "equal") + count(stack, "skipped") <= 35


def test_too_many_are_skipped_and_a_shutdown_does_not_wait(start_stack: StartStack) -> None:
    stack = start_stack(guard_share=1.0)

    async def legs(engine: ScriptedEngine, request: web.Request, seen: Seen) -> web.StreamResponse:
        return await (answer_prefill if "kv_transfer_params" in seen.body else stall)(engine, request, seen)

    stack.prefill[0].behaviour = legs
    for _ in range(20):
        assert stack.router.complete(**GREEDY).status == 200
    wait_for(lambda: count(stack, "skipped") == 3)  # one runs, sixteen wait


def test_a_long_answer_is_not_kept() -> None:
    tape = Tape()
    kept = []
    for part in (b"x" * MAX_BYTES, b"x"):
        tape.add(part)
        kept.append((tape.is_complete, len(tape._parts)))
    assert kept == [(True, 1), (False, 0)]
