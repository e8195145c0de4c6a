from __future__ import annotations

import pytest

from router.demand import Demand
from router.engines import Engine
from router.types import Endpoint, Role
from tests.router.conftest import StartStack
from tests.router.running import wait_for


def test_outstanding_goes_back_however_a_request_ends() -> None:
    busy = Engine(Endpoint(Role.DECODE, "http://127.0.0.1:1000"))
    with pytest.raises(KeyError), busy.occupied(Demand(10, 5, num_choices=2)):
        assert (busy.num_outstanding, busy.load.num_tokens) == (1, 30)
        raise KeyError
    assert (busy.num_outstanding, busy.load.num_tokens) == (0, 0)


def test_one_late_health_check_is_forgiven_and_several_are_not(start_stack: StartStack) -> None:
    stack = start_stack(health_check_timeout=0.3, health_check_failures=3, health_check_interval=0.05)
    (_, decode) = stack.router.state.pool.engines
    stack.decode[0].num_slow_checks = 1
    wait_for(lambda: stack.decode[0].num_slow_checks == 0)
    assert decode.is_up
    stack.decode[0].num_slow_checks = 1000
    wait_for(lambda: not decode.is_up)
    assert "timed out" in decode.down_reason
    stack.decode[0].num_slow_checks = 0
    wait_for(lambda: decode.is_up)


def test_an_engine_that_lists_no_models_is_down(start_stack: StartStack) -> None:
    stack = start_stack(models_interval=0.1)
    stack.decode[0].models = []
    (_, decode) = stack.router.state.pool.engines
    wait_for(lambda: not decode.is_up)
    assert "lists no model" in decode.down_reason
    assert stack.router.complete().status == 503


def test_requests_go_to_engines_that_serve_their_model(start_stack: StartStack) -> None:
    stack = start_stack(num_prefill=2, num_decode=2, models_interval=0.1)
    for side in (stack.prefill, stack.decode):
        side[1].models = [{"id": "other"}]
    wait_for(lambda: "other" in stack.router.state.pool.engines[1].models)
    wait_for(lambda: "other" in stack.router.state.pool.engines[3].models)
    for _ in range(3):
        assert stack.router.complete(model="other").status == 200
        assert stack.router.complete(model="tiny").status == 200
    assert {seen.body["model"] for e in (stack.prefill[0], stack.decode[0]) for seen in e.seen} == {"tiny"}
    assert {seen.body["model"] for e in (stack.prefill[1], stack.decode[1]) for seen in e.seen} == {"other"}
    listed = stack.router.call("GET", "/v1/models").json()["data"]
    assert {card["id"] for card in listed} == {"tiny", "other"}
