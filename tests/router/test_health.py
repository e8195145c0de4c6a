"""An engine is up if it generates, whatever its server says."""

from __future__ import annotations

import orjson

from tests.router.conftest import StartStack
from tests.router.running import wait_for
from tests.router.scripted_engine import slow, status


def test_an_engine_that_answers_and_generates_nothing_is_down(start_stack: StartStack) -> None:
    stack = start_stack(generation_check_interval=0.1)
    (_, decode) = stack.router.state.pool.engines
    stack.decode[0].can_generate = False
    wait_for(lambda: not decode.is_up)
    assert "generates nothing" in decode.down_reason
    ready = stack.router.call("GET", "/ready")
    assert ready.status == 503
    assert any("generates nothing" in (engine["reason"] or "") for engine in ready.json()["engines"])
    stack.decode[0].can_generate = True
    wait_for(lambda: decode.is_up)


def test_it_has_to_generate_before_it_is_up_and_when_a_request_failed_and_not_all_the_time(
    start_stack: StartStack,
) -> None:
    stack = start_stack(num_decode=2, health_check_interval=0.05)
    assert [engine.num_probes for engine in stack.decode] == [1, 1]
    stack.decode[0].behaviour = status(500)
    assert stack.router.complete().status == 200
    wait_for(lambda: stack.decode[0].num_probes == 2)
    assert [engine.num_probes for engine in stack.decode] == [2, 1]


def test_an_engine_with_a_long_queue_is_up_as_long_as_it_gets_on(start_stack: StartStack) -> None:
    stack = start_stack(generation_check_interval=0.05, generation_check_timeout=0.2, health_check_failures=2)
    (_, decode) = stack.router.state.pool.engines
    stack.decode[0].probe_delay = 600.0
    for _ in range(10):
        stack.decode[0].behaviour = slow(0.1)
        assert stack.router.complete().status == 200
        assert decode.is_up
    wait_for(lambda: not decode.is_up)  # without a request that ends well it has no excuse
    assert "timed out" in decode.down_reason


def test_a_probe_is_an_ordinary_request_of_one_token(start_stack: StartStack) -> None:
    stack = start_stack()
    probe = orjson.loads(stack.prefill[0].last_probe)
    assert (probe["model"], probe["max_tokens"]) == ("tiny", 1)
    assert "kv_transfer_params" not in probe, "nothing is to be kept for it"


def test_an_engine_whose_model_only_embeds_is_up(start_stack: StartStack) -> None:
    stack = start_stack(generation_check_interval=0.1)
    (_, decode) = stack.router.state.pool.engines
    stack.decode[0].only_embeds = True
    num_probes = stack.decode[0].num_probes
    wait_for(lambda: stack.decode[0].num_probes > num_probes + 4)
    assert decode.is_up
    body = {"model": "tiny", "input": "hi"}
    assert stack.router.call("POST", "/v1/embeddings", body).status == 200
