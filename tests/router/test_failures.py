"""An engine fails: another one is used while the client got nothing; after that the stream says so."""

from __future__ import annotations

import orjson
import pytest

from tests.router.conftest import Stack, StartStack
from tests.router.running import wait_for
from tests.router.scripted_engine import (
    NUM_CHUNKS,
    Behaviour,
    chunk,
    garbage,
    hang_up,
    raw_answer,
    raw_stream,
    slow,
    stall,
    status,
)

WHOLE_STREAM = b"".join(chunk(i) for i in range(NUM_CHUNKS)) + b"data: [DONE]\n\n"
# Long enough for an engine that works, on a machine that is busy.
DECODE_TIMEOUTS = {"first_token_timeout": 3.0, "generation_timeout": 3.0, "between_chunks_timeout": 3.0}
TIMEOUTS = {"prefill_timeout": 3.0, **DECODE_TIMEOUTS}

# What an engine can do wrong before it sent a token.
EARLY: dict[str, Behaviour] = {
    "500": status(500),
    "503": status(503, b"not json"),
    "redirect": status(302),
    "hang_up": hang_up,
    "stall": stall,
    "garbage": garbage,
    "not_http": raw_answer(b"220 smtp.example.com ready\r\n"),
    "truncated": raw_answer(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{"id":'),
    "cut_without_length": raw_answer(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{"id": {"a": 1'),
}
EARLY_STREAM: dict[str, Behaviour] = {
    "no_first_token": raw_stream(then="stall"),
    "closed_before_first_token": raw_stream(then="close"),
    "ended_before_first_token": raw_stream(then="end"),
    "partial_first_event": raw_stream(b'data: {"id":', then="close"),
    "error_event": raw_stream(
        b'data: {"error": {"message": "boom", "type": "x", "code": 500}}\n\n', b"data: [DONE]\n\n", then="end"
    ),
    "comments_only": raw_stream(b": keep-alive\n\n", then="close"),
}


@pytest.mark.parametrize("name", EARLY)
def test_a_failing_prefill_engine_is_replaced(start_stack: StartStack, name: str) -> None:
    stack = start_stack(num_prefill=2, **TIMEOUTS)
    stack.prefill[0].behaviour = EARLY[name]
    answer = stack.router.complete()
    assert answer.status == 200, answer.body
    record = stack.router.record(answer)
    assert [a["engine"] for a in record["attempts"]] == [e.name for e in (*stack.prefill, stack.decode[0])]
    assert record["attempts"][0]["outcome"] == ("timeout" if name == "stall" else "failed")
    assert stack.router.metric("tknp_retries_total", role="prefill") == 1
    assert stack.router.metric("prefill_requests_total", engine=stack.prefill[1].name, outcome="ok") == 1


@pytest.mark.parametrize(
    ("name", "stream"), [(n, False) for n in EARLY] + [(n, True) for n in {**EARLY, **EARLY_STREAM}]
)
def test_a_failing_decode_engine_is_replaced(start_stack: StartStack, name: str, stream: bool) -> None:
    stack = start_stack(num_decode=2, **TIMEOUTS)
    stack.decode[0].behaviour = {**EARLY, **EARLY_STREAM}[name]
    answer = stack.router.complete(stream=stream)
    assert answer.status == 200, answer.body
    assert not stream or answer.body == WHOLE_STREAM
    assert len(stack.decode[0].seen) == len(stack.decode[1].seen) == 1
    # The first decode engine may have pulled the KV cache and so freed it: it must be computed again.
    assert len(stack.prefill[0].seen) == 2


def test_kv_cache_that_nobody_was_told_of_serves_the_next_attempt(start_stack: StartStack) -> None:
    stack = start_stack(num_decode=2, health_check_interval=60.0)
    stack.decode[0].kill()
    answer = stack.router.complete()
    assert answer.status == 200
    assert len(stack.prefill[0].seen) == len(stack.decode[1].seen) == 1
    assert "kv_transfer_params" in stack.decode[1].seen[0].body
    assert not stack.router.state.pool.engines[1].is_up  # a refused connection is proof enough
    assert stack.router.complete().status == 200
    assert stack.router.metric("tknp_retries_total", role="decode") == 1


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize(
    ("name", "code", "expected"), [("500", "engine_failure", 502), ("stall", "engine_timeout", 504)]
)
def test_the_error_is_clear_when_no_engine_is_left(
    start_stack: StartStack, role: str, name: str, code: str, expected: int
) -> None:
    stack = start_stack(decode_only=False, **TIMEOUTS)
    engine = getattr(stack, role)[0]
    engine.behaviour = EARLY[name]
    answer = stack.router.complete(stream=True)
    assert (answer.status, answer.error["code"]) == (expected, code)
    assert f"{role} engine {engine.name}" in answer.error["message"]
    wait_for(stack.router.is_idle)


@pytest.mark.parametrize(("behaviour", "expected"), [(hang_up, 200), (status(500), 200), (stall, 504)])
def test_without_another_prefill_engine_the_decode_engine_prefills(
    start_stack: StartStack, behaviour: Behaviour, expected: int
) -> None:
    stack = start_stack(**TIMEOUTS)
    stack.prefill[0].behaviour = behaviour
    answer = stack.router.complete()
    assert answer.status == expected
    count = stack.router.metric("tknp_local_prefill_requests_total", reason="prefill_failed")
    assert count == (expected == 200)
    if expected == 200:
        assert "kv_transfer_params" not in stack.decode[0].seen[0].body


def test_retries_have_an_end(start_stack: StartStack) -> None:
    stack = start_stack(num_prefill=4, num_retries=2)
    for engine in stack.prefill:
        engine.behaviour = status(500)
    assert stack.router.complete().status == 502
    assert stack.num_seen == 3


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_an_engines_refusal_passes_through(stack: Stack, role: str) -> None:
    refusal = b'{"error":{"message":"the context is 4096, got 5000","type":"x","param":null,"code":400}}'
    getattr(stack, role)[0].behaviour = status(400, refusal)
    answer = stack.router.complete()
    assert (answer.status, answer.body) == (400, refusal)
    assert stack.router.record(answer)["outcome"] == "rejected"


def test_a_refusal_that_is_not_openais_gets_its_shape(stack: Stack) -> None:
    stack.prefill[0].behaviour = status(404, b'{"detail":"Not Found"}')
    answer = stack.router.complete()
    assert answer.status == 404
    assert "Not Found" in answer.error["message"]


def test_a_refusal_in_the_first_event_becomes_a_status(stack: Stack) -> None:
    event = b'data: {"error": {"message": "fits no rank; the largest is 640", "type": "x", "code": 400}}\n\n'
    stack.decode[0].behaviour = raw_stream(event + b"data: [DONE]\n\n", then="end")
    answer = stack.router.complete(stream=True)
    assert answer.status == 400
    assert "640" in answer.json()["error"]["message"]


LATE = {
    "closed": raw_stream(chunk(0), chunk(1), then="close"),
    "closed_inside_an_event": raw_stream(chunk(0), chunk(1), chunk(2)[:20], then="close"),
    "ended_without_done": raw_stream(chunk(0), chunk(1), then="end"),
    "stalled": raw_stream(chunk(0), chunk(1), then="stall"),
    "error_event": raw_stream(
        chunk(0),
        chunk(1) + b'data: {"error": {"message": "boom", "type": "x", "code": 500}}\n\ndata: [DONE]\n\n',
        then="end",
    ),
}


@pytest.mark.parametrize("name", LATE)
def test_a_stream_that_breaks_ends_with_an_error_event(start_stack: StartStack, name: str) -> None:
    stack = start_stack(num_decode=2, **TIMEOUTS)
    stack.decode[0].behaviour = LATE[name]
    answer = stack.router.complete(stream=True)
    assert answer.status == 200
    tokens, _, event = answer.body.partition(b'data: {"error"')
    assert tokens == chunk(0) + chunk(1)
    error = orjson.loads(b'{"error"' + event)["error"]
    assert error["type"] == "server_error"
    assert stack.decode[0].name in error["message"]
    assert b"[DONE]" not in answer.body
    assert not stack.decode[1].seen
    assert stack.router.record(answer)["outcome"] in ("failed", "timeout")
    wait_for(stack.router.is_idle)


@pytest.mark.parametrize("stream", [False, True])
def test_each_phase_has_its_own_time(start_stack: StartStack, stream: bool) -> None:
    """A long queue before the first token is no stall in mid-stream."""
    stack = start_stack(between_chunks_timeout=0.3)
    stack.prefill[0].behaviour = stack.decode[0].behaviour = slow(1.0)
    answer = stack.router.complete(stream=stream)
    assert answer.status == 200
    assert len(stack.decode[0].seen) == 1


def test_an_engine_that_comes_back_is_used_again(start_stack: StartStack) -> None:
    stack = start_stack()
    stack.decode[0].kill()
    assert stack.router.complete().status == 503
    stack.decode[0].revive()
    wait_for(lambda: stack.router.call("GET", "/ready").status == 200)
    assert stack.router.complete().status == 200


def test_a_dying_engine_is_noticed_without_a_request(start_stack: StartStack) -> None:
    stack = start_stack(num_decode=2)
    stack.decode[0].health_status = 503
    wait_for(lambda: not stack.router.state.pool.engines[1].is_up)
    for _ in range(3):
        assert stack.router.complete().status == 200
    assert not stack.decode[0].seen
    assert stack.router.metric("tknp_engine_up", role="decode", engine=stack.decode[0].name) == 0
    assert stack.router.metric("tknp_engine_up", role="decode", engine=stack.decode[1].name) == 1


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_no_engine_alive_is_a_503_with_retry_after(start_stack: StartStack, role: str) -> None:
    stack = start_stack(decode_only=False)
    getattr(stack, role)[0].kill()
    wait_for(lambda: stack.router.call("GET", "/ready").status == 503)
    answer = stack.router.complete()
    assert (answer.status, answer.error["code"]) == (503, "no_engine_available")
    assert int(answer.headers["retry-after"]) > 0
    assert "0 of 1" in answer.error["message"]
    assert stack.num_seen == 0


def test_retries_after_anything_but_a_death_have_a_budget(start_stack: StartStack) -> None:
    stack = start_stack(num_prefill=2, retry_ratio=0.0, retry_reserve=1)
    stack.prefill[0].behaviour = stack.prefill[1].behaviour = status(500)
    for _ in range(3):
        assert stack.router.complete().status == 502
    assert stack.router.metric("tknp_retries_total", role="prefill") == 1, "the first request's"
    assert stack.router.metric("tknp_retries_refused_total") == 3
