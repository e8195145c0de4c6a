"""Which requests skip the remote prefill, and that serving goes on when no prefill engine is left."""

from __future__ import annotations

import logging

import pytest

from router.conditional import local_prefill
from router.types import LocalPrefill
from tests.router.conftest import Stack, StartStack
from tests.router.running import wait_for

SHORT, CACHED = LocalPrefill.SHORT_PROMPT, LocalPrefill.CACHED_PROMPT


@pytest.mark.parametrize(
    ("num_prompt_tokens", "cached", "threshold", "reason"),
    [
        (1, [1], 0, None),
        (100, [], 100, SHORT),
        (101, [], 100, None),
        (101, [0, 0], 100, None),
        (1000, [0, 899], 100, None),
        (1000, [0, 900], 100, CACHED),
        (1000, [1000], 1, CACHED),
    ],
)
def test_the_threshold(num_prompt_tokens: int, cached: list[int], threshold: int, reason: LocalPrefill | None) -> None:
    assert local_prefill(num_prompt_tokens, cached, threshold) is reason


def count(stack: Stack, reason: LocalPrefill) -> float:
    return stack.router.metric("tknp_local_prefill_requests_total", reason=reason)


def test_short_prompts_stay_on_the_decode_engine(start_stack: StartStack) -> None:
    stack = start_stack(local_prefill_tokens=50)
    answer = stack.router.complete(prompt=[1] * 50)
    assert answer.status == 200
    assert stack.router.record(answer)["local_prefill"] == "short_prompt"
    assert "kv_transfer_params" not in stack.decode[0].seen[0].body
    assert stack.router.chat().status == 200
    assert not stack.prefill[0].seen
    assert stack.router.complete(prompt=[1] * 51).status == 200
    assert len(stack.prefill[0].seen) == 1
    assert "kv_transfer_params" in stack.decode[0].seen[2].body
    assert count(stack, SHORT) == 2
    assert stack.router.metric("tknp_local_prefill_threshold_tokens") == 50


def test_a_prompt_whose_beginning_is_cached_goes_to_the_engine_that_has_it(start_stack: StartStack) -> None:
    stack = start_stack(1, 3, local_prefill_tokens=200, decode_policy="round_robin")
    document = list(range(2000))
    assert stack.router.complete(prompt=document).status == 200
    (home,) = (engine for engine in stack.decode if engine.seen)
    for turn in range(1, 4):
        assert stack.router.complete(prompt=[*document, *[turn] * 100]).status == 200
    assert len(home.seen) == 4
    assert len(stack.prefill[0].seen) == 1
    assert count(stack, CACHED) == 3
    assert stack.router.complete(prompt=[*document[:1000], *range(5000, 6000)]).status == 200
    assert len(stack.prefill[0].seen) == 2, "half of it is not cached anywhere"


def test_an_engine_that_was_down_has_nothing_cached(start_stack: StartStack) -> None:
    stack = start_stack(local_prefill_tokens=200)
    document = list(range(2000))
    assert stack.router.complete(prompt=document).status == 200
    engine = stack.router.state.pool.engines[1]
    stack.decode[0].kill()
    wait_for(lambda: not engine.is_up)
    stack.decode[0].revive()
    wait_for(lambda: engine.is_up)
    assert stack.router.complete(prompt=document).status == 200
    assert len(stack.prefill[0].seen) == 2
    assert count(stack, CACHED) == 0


def test_decode_engines_serve_alone_when_no_prefill_engine_is_up(
    start_stack: StartStack, caplog: pytest.LogCaptureFixture
) -> None:
    stack = start_stack(1, 1)
    stack.prefill[0].kill()
    wait_for(lambda: not stack.router.state.pool.engines[0].is_up)
    with caplog.at_level(logging.WARNING, "router.choice"):
        for _ in range(3):
            assert stack.router.complete(stream=True).status == 200
    assert [record.message for record in caplog.records if record.name == "router.choice"] == [
        "no prefill engine is up for tiny: decode engines serve alone and prefill themselves"
    ]
    assert all("kv_transfer_params" not in seen.body for seen in stack.decode[0].seen)
    assert count(stack, LocalPrefill.NO_PREFILL_ENGINE) == 3
    assert stack.router.metric("tknp_models_without_prefill_engine") == 1
    ready = stack.router.call("GET", "/ready")
    assert (ready.status, ready.json()["missing"]) == (200, [])
    assert "tiny" in ready.json()["degraded"][0]
    caplog.clear()
    stack.prefill[0].revive()
    wait_for(lambda: stack.router.call("GET", "/ready").json()["degraded"] == [])
    with caplog.at_level(logging.WARNING, "router.choice"):
        assert stack.router.complete().status == 200
    assert len(stack.prefill[0].seen) == 1
    assert [r.message for r in caplog.records if r.name == "router.choice"] == [
        "a prefill engine is up for tiny again: prompts are prefilled there"
    ]


def test_a_router_may_have_no_prefill_engines_at_all(start_stack: StartStack) -> None:
    stack = start_stack(0, 2)
    assert stack.router.call("GET", "/ready").status == 200
    assert stack.router.complete().status == 200


def test_the_last_prefill_engine_dies_with_a_request(start_stack: StartStack) -> None:
    stack = start_stack(1, 1, health_check_interval=60.0)
    stack.prefill[0].kill()  # unnoticed until the request gets no connection
    answer = stack.router.complete()
    assert answer.status == 200
    assert stack.router.record(answer)["local_prefill"] == "no_prefill_engine"
    attempts = [(a["role"], a["outcome"]) for a in stack.router.record(answer)["attempts"]]
    assert attempts == [("prefill", "failed"), ("decode", "ok")]


def test_decode_only_can_be_switched_off(start_stack: StartStack) -> None:
    stack = start_stack(0, 1, decode_only=False)
    assert stack.router.call("GET", "/ready").json()["missing"] == ["no prefill engine is up"]
    assert stack.router.complete().status == 503
    assert not stack.decode[0].seen
