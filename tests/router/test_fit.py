from __future__ import annotations

from router.types import Role
from tests.router.conftest import StartStack
from tests.router.running import wait_for

FLOAT = {"model": "m", "dtype": "float32"}
HALF = {"model": "m", "dtype": "bfloat16"}


def test_engines_that_do_not_fit_are_named_and_get_no_request(start_stack: StartStack) -> None:
    stack = start_stack(kv_traits=[FLOAT, HALF])
    wait_for(lambda: all(engine.is_up for engine in stack.router.state.pool.engines))
    engines = f"{stack.prefill[0].name} (prefill) and {stack.decode[0].name} (decode)"
    named = f"{engines} don't fit: dtype is float32 and bfloat16"
    ready = stack.router.call("GET", "/ready")
    assert ready.status == 503
    assert any(named in fault for fault in ready.json()["missing"])
    answer = stack.router.complete()
    assert answer.status == 503
    assert named in answer.error["message"]
    assert stack.num_seen == 0


def test_a_request_stays_among_engines_that_fit(start_stack: StartStack) -> None:
    stack = start_stack(num_prefill=2, num_decode=2, kv_traits=[FLOAT, HALF, HALF, FLOAT])
    wait_for(lambda: all(engine.is_up for engine in stack.router.state.pool.engines))
    for _ in range(6):
        assert stack.router.complete().status == 200
    prefill = [len(engine.seen) for engine in stack.prefill]
    decode = [len(engine.seen) for engine in stack.decode]
    assert prefill == [3, 3]
    assert decode == prefill[::-1], "a decode engine was given a KV cache that it can't read"


def test_an_engine_that_tells_nothing_fits(start_stack: StartStack) -> None:
    stack = start_stack(kv_traits=[None, HALF])
    wait_for(lambda: all(engine.is_up for engine in stack.router.state.pool.engines))
    assert stack.router.complete().status == 200


def test_a_retry_stays_among_engines_that_fit(start_stack: StartStack) -> None:
    stack = start_stack(num_decode=3, kv_traits=[FLOAT, FLOAT, FLOAT, HALF])
    wait_for(lambda: all(engine.is_up for engine in stack.router.state.pool.engines))
    stack.decode[0].kill()
    stack.decode[1].kill()
    wait_for(lambda: sum(e.is_up for e in stack.router.state.pool.of(Role.DECODE)) == 1)
    answer = stack.router.complete()
    assert answer.status == 503
    assert "don't fit" in answer.error["message"]
    stack.decode[1].revive()
    wait_for(lambda: stack.router.complete().status == 200)
    assert not stack.decode[2].seen
