from __future__ import annotations

from router.breaker import HOLD_SECONDS, MAX_HOLD_SECONDS, CircuitBreaker
from tests.router.conftest import StartStack
from tests.router.running import wait_for
from tests.router.scripted_engine import answer_decode, status


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def opened(clock: Clock) -> CircuitBreaker:
    breaker = CircuitBreaker(3, clock)
    assert [breaker.failed() for _ in range(3)] == [False, False, True]
    assert breaker.is_open
    return breaker


def test_only_failures_in_a_row_open_it() -> None:
    breaker = CircuitBreaker(3)
    for _ in range(2):
        breaker.failed()
        breaker.failed()
        breaker.succeeded()
    assert not breaker.is_open


def test_a_generation_closes_it_but_not_before_its_time() -> None:
    clock = Clock()
    breaker = opened(clock)
    breaker.proved()
    assert breaker.is_open
    clock.now += HOLD_SECONDS
    breaker.proved()
    assert not breaker.is_open


def test_it_stays_open_longer_each_time_until_a_request_ends_well() -> None:
    clock = Clock()
    breaker = opened(clock)
    holds = []
    for _ in range(8):
        begin = clock.now
        while breaker.is_open:
            clock.now += HOLD_SECONDS / 4
            breaker.proved()
        holds.append(clock.now - begin)
        for _ in range(3):
            breaker.failed()
    assert holds[:3] == [HOLD_SECONDS, 2 * HOLD_SECONDS, 4 * HOLD_SECONDS]
    assert holds[-1] == MAX_HOLD_SECONDS
    breaker.succeeded()
    for _ in range(3):
        breaker.failed()
    clock.now += HOLD_SECONDS
    breaker.proved()
    assert not breaker.is_open


def test_an_engine_that_fails_request_after_request_gets_no_more_until_it_generates(start_stack: StartStack) -> None:
    stack = start_stack(num_decode=2, breaker_failures=3, num_retries=1, health_check_interval=0.05)
    failing = stack.decode[0]
    (engine,) = [e for e in stack.router.state.pool.engines if e.endpoint.name == failing.name]
    failing.behaviour = status(500)
    for _ in range(20):
        assert stack.router.complete().status == 200
    assert len(failing.seen) == 3
    failing.behaviour = answer_decode
    # The health check's token would close it at once, if it had not to stay open for a while.
    assert engine.is_up
    wait_for(lambda: not engine.breaker.is_open)
    for _ in range(4):
        assert stack.router.complete().status == 200
    assert len(failing.seen) > 3


def test_where_every_engine_fails_requests_they_are_still_tried(start_stack: StartStack) -> None:
    stack = start_stack(breaker_failures=1, num_retries=0)
    stack.decode[0].behaviour = status(500)
    assert [stack.router.complete().status for _ in range(3)] == [502, 502, 502]
