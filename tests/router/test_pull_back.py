"""A prompt whose beginning a decode engine has: it is kept there, and the prefill engine is told where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web

from router.demand import Demand
from router.engines import Engine
from router.event_index import EventIndex
from router.legs import PULLED_BACK
from router.pull_back import longest
from router.types import Endpoint, Role
from tests.router.conftest import Stack, StartStack
from tests.router.running import wait_for
from tests.router.scripted_engine import (
    KV_PARAMS,
    Behaviour,
    ScriptedEngine,
    Seen,
    answer_either,
    answer_prefill,
    garbage,
    hang_up,
    stall,
    status,
)

BLOCK = 16
TALK = list(range(1000, 1400))


def knowing(num_tokens: int | None) -> EventIndex | None:
    """Of an engine that has so much of TALK; None if it does not tell."""
    if num_tokens is None:
        return None
    index = EventIndex(BLOCK)
    for first in range(0, num_tokens // BLOCK * BLOCK, BLOCK):
        parent = first - BLOCK if first else None
        stored = {"type": "BlockStored", "block_size": BLOCK, "block_hashes": [first], "parent_block_hash": parent}
        index.apply({**stored, "token_ids": TALK[first : first + BLOCK]})
    return index


def engine(num_tokens: int | None) -> Engine:
    made = Engine(Endpoint(Role.DECODE, f"http://{num_tokens}:1"))
    made.load.events = knowing(num_tokens)
    return made


@pytest.mark.parametrize(
    ("decode", "found"),
    [
        ([160], (0, 160)),
        ([64, None, 160, 112], (2, 160)),
        ([None], None),
        ([], None),
        ([400], None),  # all of it: there is nothing to compute
    ],
)
def test_the_longest_is_taken(decode: list[int | None], found: tuple[int, int] | None) -> None:
    engines = [engine(num_tokens) for num_tokens in decode]
    best = longest(engines, Demand(token_ids=TALK))
    assert (best and (engines.index(best.engine), best.num_cached)) == found


def test_a_prompt_whose_tokens_are_not_known_is_left_alone() -> None:
    assert longest([engine(160)], Demand()) is None


@pytest.fixture
def talking(start_stack: StartStack) -> Callable[..., Stack]:
    """A stack whose decode engine has 320 tokens of TALK."""

    def start(
        behaviour: Behaviour = answer_either, roles: Any = tuple(Role), prefill_has: int = 0, **settings: Any
    ) -> Stack:
        stack = start_stack(kv_roles=roles, **{"pull_back_tokens": 64, **settings})
        prefill, decode = stack.router.state.pool.engines
        prefill.load.events, decode.load.events = knowing(prefill_has), knowing(320)
        stack.decode[0].behaviour, stack.prefill[0].behaviour = behaviour, pull_and_keep
        if roles == tuple(Role) and stack.router.state.settings.pull_back_tokens:
            wait_for(lambda: len(stack.router.state.fleet.pull_back._able) == 2)
        return stack

    return start


async def pull_and_keep(engine: ScriptedEngine, request: web.Request, seen: Seen) -> web.StreamResponse:
    """As an engine that pulls what it is offered."""
    is_offered = seen.body["kv_transfer_params"]["remote_engine_id"] is not None
    return web.json_response({"choices": [], "kv_transfer_params": {**KV_PARAMS, PULLED_BACK: is_offered}})


def params(engine: ScriptedEngine, index: int = 0) -> Any:
    return engine.seen[index].body["kv_transfer_params"]


def test_a_decode_engine_keeps_what_it_has_and_one_token(talking: Callable[..., Stack]) -> None:
    stack = talking()
    assert stack.router.complete(prompt=TALK).status == 200
    kept, answered = stack.decode[0].seen
    assert (kept.body["prompt"], kept.body["max_tokens"]) == (TALK[:321], 1)
    assert kept.headers["x-request-id"] != answered.headers["x-request-id"], "engines drop requests by their ids"
    assert params(stack.decode[0])["do_remote_decode"]
    sent = params(stack.prefill[0])
    assert (sent["remote_engine_id"], sent["do_remote_decode"], sent["do_remote_prefill"]) == ("p0", True, False)
    assert sent["tknp_lease_id"] != params(stack.decode[0])["tknp_lease_id"]
    assert stack.router.metric("tknp_pull_backs_total", end="kept") == 1
    assert stack.decode[0].released == [], "the prefill engine's pull ends it"


@pytest.mark.parametrize(
    "setting",
    [
        {"pull_back_tokens": 0},
        {"pull_back_tokens": 321},
        {"prefill_has": 272},
        {"roles": ("decode",)},
        {"roles": None},
    ],
    ids=["off", "too little", "has most", "one role", "stock"],
)
def test_where_it_is_not_worth_it_or_not_to_be_had(talking: Callable[..., Stack], setting: dict[str, Any]) -> None:
    stack = talking(**setting)
    assert stack.router.complete(prompt=TALK).status == 200
    assert len(stack.decode[0].seen) == 1
    assert params(stack.prefill[0])["remote_engine_id"] is None


@pytest.mark.parametrize("behaviour", [hang_up, garbage, status(500), status(400)])
def test_what_goes_wrong_costs_a_prefill(talking: Callable[..., Stack], behaviour: Behaviour) -> None:
    async def once(engine: ScriptedEngine, request: Any, seen: Any) -> Any:
        engine.behaviour = answer_either
        return await behaviour(engine, request, seen)

    stack = talking(once)
    assert stack.router.complete(prompt=TALK).status == 200
    assert params(stack.prefill[0])["remote_engine_id"] is None
    assert stack.router.metric("tknp_pull_backs_total", end="failed") == 1
    wait_for(lambda: stack.decode[0].released == [params(stack.decode[0])["tknp_lease_id"]])


def test_an_engine_that_keeps_nothing_costs_a_prefill(talking: Callable[..., Stack]) -> None:
    async def once(engine: ScriptedEngine, request: Any, seen: Any) -> Any:
        seen.body["kv_transfer_params"]["do_remote_decode"] = False
        return await answer_either(engine, request, seen)

    stack = talking(once)
    assert stack.router.complete(prompt=TALK).status == 200
    assert params(stack.prefill[0])["remote_engine_id"] is None
    assert stack.router.metric("tknp_pull_backs_total", end="not_kept") == 1


def test_what_is_not_pulled_is_given_back_at_once_and_not_asked_for_again_soon(talking: Callable[..., Stack]) -> None:
    stack = talking()
    stack.prefill[0].behaviour = answer_prefill  # it could not
    stack.decode[0].behaviour = answer_either
    assert stack.router.complete(prompt=TALK).status == stack.router.complete(prompt=TALK).status == 200
    wait_for(lambda: stack.decode[0].released == [params(stack.decode[0])["tknp_lease_id"]])
    assert stack.prefill[0].aborted == [], "the request went on there"
    assert stack.router.metric("tknp_pull_backs_total", end="kept") == 1


def test_an_engine_that_hangs_is_not_waited_for_long(
    talking: Callable[..., Stack], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.pull_back.PATIENCE", 0.2)
    stack = talking(stall)
    raw = stack.router.open_stream(prompt=TALK)
    wait_for(lambda: stack.prefill[0].seen)
    assert stack.decode[0].seen[0].cancelled.wait(10)
    raw.close()


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_hang_up_gives_back_what_is_kept(talking: Callable[..., Stack], phase: str) -> None:
    stack = talking(stall if phase == "decode" else answer_either)
    stack.prefill[0].behaviour = stall
    raw = stack.router.open_stream(prompt=TALK)
    wait_for(lambda: getattr(stack, phase)[0].seen)
    raw.close()
    wait_for(lambda: stack.decode[0].released == [params(stack.decode[0])["tknp_lease_id"]], 1.5)
    wait_for(stack.router.is_idle)


def test_a_prefill_engine_that_fails_leaves_nothing_kept(talking: Callable[..., Stack]) -> None:
    stack = talking()
    stack.prefill[0].behaviour = status(500)
    assert stack.router.complete(prompt=TALK).status == 200, "the decode engine prefills"
    wait_for(lambda: stack.decode[0].released == [params(stack.decode[0])["tknp_lease_id"]])
    request_id = stack.prefill[0].seen[0].headers["x-request-id"]
    assert request_id in stack.prefill[0].aborted, "it reads nothing any more"


def test_engines_with_blocks_of_other_sizes_are_left_alone(talking: Callable[..., Stack]) -> None:
    stack = talking()
    stack.router.state.pool.engines[0].load.events = EventIndex(2 * BLOCK)
    assert stack.router.complete(prompt=TALK).status == 200
    assert len(stack.decode[0].seen) == 1


def test_an_engine_that_did_not_say_its_roles_is_asked_again(start_stack: StartStack) -> None:
    stack = start_stack(kv_roles=tuple(Role), pull_back_tokens=64, health_check_interval=0.1)
    able = stack.router.state.fleet.pull_back._able
    wait_for(lambda: len(able) == 2)
    stack.decode[0].kill()
    wait_for(lambda: len(able) == 1)
    answers: list[str] = []

    def fail_once() -> None:
        answers.append("")
        if len(answers) == 1:
            raise RuntimeError("a moment of weakness")

    stack.decode[0].on_kv_roles = fail_once
    stack.decode[0].revive()
    wait_for(lambda: len(able) == 2)
    assert len(answers) == 2
