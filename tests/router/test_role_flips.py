from __future__ import annotations

import time
from functools import partial

import pytest

from tests.router.conftest import StartStack
from tests.router.running import wait_for
from tests.router.scripted_engine import answer_either, slow, stall

BOTH = {"roles": ["prefill", "decode"]}
SETTINGS = {"flip_roles": True, "flip_prefill_tokens": 50, "flip_hold": 0.2, "flip_cooldown": 60.0}
RANK = {"rank": 0, "num_blocks": 1000, "num_free_blocks": 1000, "block_size": 16, "num_requests": 0}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.role_flips.LOOK_INTERVAL", 0.1)


def test_a_decode_engine_helps_the_prefill_pool_after_its_requests(start_stack: StartStack) -> None:
    stack = start_stack(num_prefill=1, num_decode=2, **SETTINGS)
    (prefill,), decode = stack.prefill, stack.decode
    for engine in decode:
        engine.ranks, engine.kv_roles = [RANK], BOTH
    wait_for(lambda: all(e.load.kv.rooms for e in stack.router.state.pool.engines[1:]))
    prefill.behaviour = slow(4.0)
    stuck = stack.router.open_stream(prompt="x" * 1000)
    role = stack.router.state.pool

    def roles() -> list[str]:
        return sorted(e.endpoint.role.value for e in role.engines if e.is_up and not e.is_draining)

    wait_for(lambda: roles() == ["decode", "prefill", "prefill"])
    assert stack.router.metric("tknp_role_flips_total", role="prefill") == 1
    assert stack.router.metric("tknp_pool_pressure", role="prefill") > 0
    (flipped,) = [e for e in role.engines if e.endpoint.role == "prefill" and e.endpoint.url != prefill.url]
    helper = next(e for e in decode if e.url == flipped.endpoint.url)
    helper.behaviour = answer_either
    assert stack.router.complete().status == 200
    assert helper.seen[-1].body["kv_transfer_params"]["do_remote_decode"], "it prefills now"
    got = b""
    while b"[DONE]" not in got:
        got += stuck.recv(4096)
    stuck.close()


@pytest.mark.parametrize("told", [None, {"roles": ["decode"]}, {"roles": 7}, []])
def test_engines_that_do_not_say_that_they_can_keep_their_role(
    start_stack: StartStack, told: object, caplog: pytest.LogCaptureFixture
) -> None:
    stack = start_stack(num_prefill=1, num_decode=2, **SETTINGS)
    for engine in stack.decode:
        engine.ranks, engine.kv_roles = [RANK], told
    stack.prefill[0].behaviour = stall
    stuck = stack.router.open_stream(prompt="x" * 1000)
    wait_for(lambda: "no decode engine can change its role" in caplog.text)
    assert [e.endpoint.role for e in stack.router.state.pool.engines] == ["prefill", "decode", "decode"]
    assert stack.router.metric("tknp_role_flips_total", role="prefill") == 0
    stuck.close()
    wait_for(stack.router.is_idle)


def test_the_only_engine_of_a_model_keeps_its_role(start_stack: StartStack, caplog: pytest.LogCaptureFixture) -> None:
    stack = start_stack(num_prefill=1, num_decode=2, models_interval=0.1, **SETTINGS)
    for engine, name in zip(stack.decode, ("tiny", "other"), strict=True):
        engine.ranks, engine.kv_roles = [RANK], BOTH
        engine.models = [{"id": name, "max_model_len": 4096}]
    (_, tiny, other) = stack.router.state.pool.engines
    wait_for(lambda: list(other.models) == ["other"] and tiny.load.kv.rooms and other.load.kv.rooms)
    stack.prefill[0].behaviour = stall
    stuck = stack.router.open_stream(prompt="x" * 1000)
    wait_for(lambda: "it is the only one of its model" in caplog.text)
    stuck.close()
    wait_for(stack.router.is_idle)


def test_one_that_is_left_alone_while_it_is_asked_keeps_its_role(start_stack: StartStack) -> None:
    stack = start_stack(num_prefill=1, num_decode=2, **SETTINGS)
    (_, *pool) = stack.router.state.pool.engines
    asked: list[int] = []

    def pause(other: int) -> None:
        asked.append(other)
        pool[other].is_paused = True

    for index, engine in enumerate(stack.decode):
        engine.ranks, engine.kv_roles = [RANK], BOTH
        engine.on_kv_roles = partial(pause, 1 - index)
    wait_for(lambda: all(engine.load.kv.rooms for engine in pool))
    stack.prefill[0].behaviour = stall
    stuck = stack.router.open_stream(prompt="x" * 1000)
    wait_for(lambda: asked and stack.router.metric("tknp_pool_pressure", role="prefill") > 1)
    time.sleep(0.5)  # five more looks
    assert [e.endpoint.role for e in stack.router.state.pool.engines] == ["prefill", "decode", "decode"]
    assert stack.router.metric("tknp_role_flips_total", role="prefill") == 0
    stuck.close()
    wait_for(stack.router.is_idle)
