"""KV cache that was computed in vain is given back at once, whatever the request came to."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.router.conftest import Stack, StartStack
from tests.router.running import wait_for
from tests.router.scripted_engine import KV_PARAMS, MODEL, ScriptedEngine, hang_up, raw_stream, stall, status


def lease_of(engine: ScriptedEngine, index: int = 0) -> str:
    lease: str = engine.seen[index].body["kv_transfer_params"]["tknp_lease_id"]
    return lease


def test_each_prefill_leg_has_a_lease_of_its_own(start_stack: StartStack) -> None:
    stack = start_stack(num_decode=2)
    stack.decode[0].behaviour = hang_up
    assert stack.router.complete().status == 200
    first, second = (lease_of(stack.prefill[0], i) for i in (0, 1))
    assert first != second
    # What the decode engine that died was told of, and nothing else; and before the next attempt, which has its id.
    assert stack.prefill[0].released == [first]
    assert stack.decode[0].aborted == [stack.prefill[0].seen[0].headers["x-request-id"]]


def test_a_request_that_ends_well_releases_nothing(stack: Stack) -> None:
    assert stack.router.complete().status == stack.router.complete(stream=True).status == 200
    time.sleep(0.3)
    assert stack.prefill[0].released == stack.decode[0].aborted == []


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_hang_up_releases_within_a_second(stack: Stack, phase: str, stream: bool) -> None:
    engine = getattr(stack, phase)[0]
    engine.behaviour = stall
    raw = stack.router.open_stream(stream=stream)
    wait_for(lambda: engine.seen)
    begin = time.monotonic()
    raw.close()
    wait_for(lambda: stack.prefill[0].released)
    assert time.monotonic() - begin < 1.0
    assert stack.prefill[0].released == [lease_of(stack.prefill[0])]
    # A decode engine that may be reading the cache has to drop the request before.
    request_id = stack.prefill[0].seen[0].headers["x-request-id"]
    assert stack.decode[0].aborted == ([request_id] if phase == "decode" else [])
    wait_for(lambda: stack.router.metric("tknp_kv_leases_total", end="released") == 1)


def test_a_hang_up_after_the_first_token_has_nothing_to_release(stack: Stack) -> None:
    stack.decode[0].behaviour = raw_stream(b"data: {}\n\n", then="stall")
    raw = stack.router.open_stream()
    while b"data: {}" not in raw.recv(4096):
        pass
    raw.close()
    assert stack.decode[0].seen[0].cancelled.wait(10)
    wait_for(stack.router.is_idle)
    time.sleep(0.2)
    assert stack.prefill[0].released == []


def test_a_decode_engine_s_refusal_releases(stack: Stack) -> None:
    stack.decode[0].behaviour = status(422)
    assert stack.router.complete().status == 422
    wait_for(lambda: stack.prefill[0].released)


def test_a_prefill_engine_s_refusal_left_nothing_behind(stack: Stack) -> None:
    stack.prefill[0].behaviour = status(400)
    assert stack.router.complete().status == 400
    time.sleep(0.2)
    assert stack.prefill[0].released == []


def test_a_decode_engine_that_is_gone_needs_no_abort(start_stack: StartStack) -> None:
    stack = start_stack(num_retries=0, health_check_interval=60.0)

    async def die(engine, request, seen):  # type: ignore[no-untyped-def]
        asyncio.get_running_loop().create_task(engine._stop())
        return await hang_up(engine, request, seen)

    stack.decode[0].behaviour = die
    assert stack.router.complete().status == 502
    wait_for(lambda: stack.prefill[0].released)


def test_a_stock_prefill_engine_is_told_by_a_decode_engine(start_stack: StartStack) -> None:
    stack = start_stack(num_decode=2, num_retries=0, health_check_interval=60.0)
    stack.prefill[0].has_release = False
    stack.decode[0].kill()
    assert stack.router.complete().status == 502
    wait_for(lambda: stack.decode[1].seen)
    release = stack.decode[1].seen[0].body
    assert release["kv_transfer_params"] == KV_PARAMS
    assert release["model"] != MODEL  # vLLM refuses it, and notifies the prefill engine because it did


def test_what_nobody_can_be_told_of_is_counted(start_stack: StartStack) -> None:
    stack = start_stack(num_retries=0, health_check_interval=60.0)
    stack.prefill[0].behaviour = hang_up
    stack.prefill[0].has_release = False
    assert stack.router.complete().status == 502
    wait_for(lambda: stack.router.metric("tknp_kv_leases_total", end="expires") == 1)
