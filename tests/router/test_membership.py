from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from router.types import Endpoint, Role
from tests.router.conftest import Stack, StartStack
from tests.router.running import wait_for
from tests.router.scripted_engine import ScriptedEngine, Seen, chunk, raw_stream


def found(stack: Stack, *engines: tuple[Role, str]) -> None:
    """As discovery says it, on the router's own loop."""
    loop = stack.router.server.servers[0].get_loop()
    endpoints = [Endpoint(role, url) for role, url in engines]
    loop.call_soon_threadsafe(stack.router.state.membership.found, endpoints)


def urls(stack: Stack) -> list[str]:
    return [engine.endpoint.url for engine in stack.router.state.pool.engines]


def test_a_prefill_engine_stays_until_its_kv_cache_was_pulled(start_stack: StartStack) -> None:
    """It has no request any more, but the decode engine still reads from it: until the first token."""
    stack = start_stack(num_prefill=2)
    leaving, other = stack.prefill
    decode = stack.decode[0]
    stream = raw_stream(*map(chunk, range(3)), b"data: [DONE]\n\n", then="end", pause=0.5)

    async def late(engine: ScriptedEngine, request: web.Request, seen: Seen) -> web.StreamResponse:
        await asyncio.sleep(1.0)
        return await stream(engine, request, seen)

    decode.behaviour = late
    stack.router.state.pool.engines[1].is_paused = True
    raw = stack.router.open_stream()
    wait_for(lambda: decode.seen)
    found(stack, (Role.PREFILL, other.url), (Role.DECODE, decode.url))
    engine = stack.router.state.pool.engines[0]
    wait_for(lambda: engine.is_leaving)
    assert engine.num_outstanding == 0
    assert leaving.url in urls(stack)
    assert chunk(0) in raw.recv(65536)
    wait_for(lambda: leaving.url not in urls(stack))
    assert stack.router.state.records.in_flight(), "it need not wait for the whole stream"
    raw.close()
    wait_for(stack.router.is_idle)


def test_what_the_operator_drains_stays_drained_when_it_is_found_again(start_stack: StartStack) -> None:
    stack = start_stack(num_decode=2)
    all_of_them = [(Role.PREFILL, stack.prefill[0].url), *((Role.DECODE, engine.url) for engine in stack.decode)]
    drained = stack.decode[1]
    drained.behaviour = raw_stream(*map(chunk, range(20)), then="end", pause=0.2)
    stack.router.state.pool.engines[1].is_paused = True
    raw = stack.router.open_stream()
    wait_for(lambda: drained.seen)
    stack.router.call("POST", f"/admin/engines/{drained.name}/drain")
    engine = stack.router.state.pool.engines[2]
    found(stack, *all_of_them[:2])
    wait_for(lambda: engine.is_leaving)
    found(stack, *all_of_them)
    wait_for(lambda: not engine.is_leaving)
    shown = stack.router.call("GET", "/ready").json()["engines"][2]
    assert (shown["url"], shown["draining"]) == (drained.url, True)
    stack.router.call("POST", f"/admin/engines/{drained.name}/resume")
    assert stack.router.call("GET", "/ready").json()["engines"][2]["draining"] is False
    raw.close()
    wait_for(stack.router.is_idle)


def test_a_gone_engines_counters_go_too(start_stack: StartStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.membership.FORGET_SECONDS", 0.5)
    stack = start_stack(num_decode=2)
    for _ in range(4):
        assert stack.router.complete().status == 200
    stays, goes = stack.decode

    def legs(name: str) -> float:
        return stack.router.metric("decode_requests_total", engine=name, outcome="ok")

    assert legs(goes.name) and legs(stays.name)
    found(stack, (Role.PREFILL, stack.prefill[0].url), (Role.DECODE, stays.url))
    wait_for(lambda: goes.url not in urls(stack))
    assert legs(goes.name), "a scrape must still see the last ones"
    wait_for(lambda: not legs(goes.name))
    assert legs(stays.name)


def test_an_engine_that_may_be_named_as_a_host_may_not_after_it_has_left(start_stack: StartStack) -> None:
    stack = start_stack()
    hosts = stack.router.state.fleet.hosts
    found(stack, (Role.PREFILL, "http://203.0.113.7:1"), (Role.DECODE, stack.decode[0].url))
    wait_for(lambda: "203.0.113.7" in hosts._engine_hosts)
    found(stack, (Role.PREFILL, stack.prefill[0].url), (Role.DECODE, stack.decode[0].url))
    wait_for(lambda: "203.0.113.7" not in hosts._engine_hosts)
