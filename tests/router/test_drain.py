from __future__ import annotations

import signal
import time

import pytest

from tests.router.conftest import StartStack
from tests.router.running import wait_for
from tests.router.scripted_engine import chunk, raw_stream


def test_an_engine_that_drains_ends_what_it_has_and_gets_nothing_new(start_stack: StartStack) -> None:
    stack = start_stack(num_decode=2)
    draining, other = stack.decode
    draining.behaviour = other.behaviour = raw_stream(chunk(0), chunk(1), b"data: [DONE]\n\n", then="end", pause=0.3)
    raw = stack.router.open_stream()
    wait_for(lambda: draining.seen or other.seen)
    if other.seen:
        draining, other = other, draining
    told = stack.router.call("POST", f"/admin/engines/{draining.name}/drain")
    assert told.json() == {"engine": draining.name, "draining": True, "outstanding_requests": 1}
    for _ in range(3):
        assert stack.router.complete(stream=True).status == 200
    got = b""
    while b"[DONE]" not in got:
        got += raw.recv(4096)
    raw.close()
    assert chunk(1) in got
    assert (len(draining.seen), len(other.seen)) == (1, 3)
    (shown,) = [e for e in stack.router.call("GET", "/ready").json()["engines"] if e["url"] == draining.url]
    assert shown["draining"] is True
    stack.router.call("POST", f"/admin/engines/{draining.name}/resume")
    while len(draining.seen) == 1:
        assert stack.router.complete(stream=True).status == 200


def test_the_last_engine_may_drain_too(start_stack: StartStack) -> None:
    stack = start_stack()
    stack.router.call("POST", f"/admin/engines/{stack.decode[0].name}/drain")
    answer = stack.router.complete()
    assert answer.status == 503
    assert "1 are draining" in answer.error["message"]
    assert stack.router.call("GET", "/ready").status == 503


def test_an_engine_that_nobody_knows(start_stack: StartStack) -> None:
    stack = start_stack()
    answer = stack.router.call("POST", "/admin/engines/nobody:1/drain")
    assert answer.status == 404
    assert stack.decode[0].name in answer.error["message"]


@pytest.mark.parametrize("num_signals", [1, 2])
def test_after_sigterm_the_router_serves_on_while_ready_says_no(start_stack: StartStack, num_signals: int) -> None:
    stack = start_stack(drain_seconds=1.5)
    server = stack.router.server
    begin = time.monotonic()
    server.handle_exit(signal.SIGTERM, None)  # as uvicorn's signal handler does
    wait_for(lambda: stack.router.state.is_draining)
    ready = stack.router.call("GET", "/ready")
    assert (ready.status, ready.json()["missing"]) == (503, ["the router is draining"])
    assert stack.router.complete().status == 200
    assert not server.should_exit
    if num_signals == 2:
        server.handle_exit(signal.SIGTERM, None)
    wait_for(lambda: server.should_exit)
    assert (time.monotonic() - begin < 1.4) is (num_signals == 2)
