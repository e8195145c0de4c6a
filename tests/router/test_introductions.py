from __future__ import annotations

import time

from tests.router.conftest import StartStack
from tests.router.running import wait_for
from tests.router.scripted_engine import ScriptedEngine

PEER = {"engine_id": "one", "host": "127.0.0.1", "port": 7, "tp_size": 1, "dcp_size": 1, "pp_size": 1}


def come_back(engine: ScriptedEngine, **peer: object) -> None:
    """The engine is started again, and is another one then."""
    engine.kill()
    engine.kv_peer = {**PEER, **peer}
    time.sleep(0.5)
    engine.revive()


def test_decode_engines_hear_of_prefill_engines_once_and_again_when_one_comes_back(start_stack: StartStack) -> None:
    stack = start_stack(num_decode=2, health_check_interval=0.1)
    prefill, decode = stack.prefill[0], stack.decode
    come_back(prefill)
    wait_for(lambda: [engine.kv_peers for engine in decode] == [[PEER], [PEER]])
    time.sleep(0.5)
    assert [engine.kv_peers for engine in decode] == [[PEER], [PEER]], "once"
    come_back(prefill, engine_id="two")
    wait_for(lambda: [engine.kv_peers[-1]["engine_id"] for engine in decode] == ["two", "two"])
    decode[0].kv_peers.clear()
    come_back(decode[0])
    wait_for(lambda: [peer["engine_id"] for peer in decode[0].kv_peers] == ["two"])


def test_nobody_is_told_of_a_foreign_host_or_of_an_engine_that_does_not_fit(start_stack: StartStack) -> None:
    traits = [None, {"dtype": "a"}, None, {"dtype": "b"}]
    stack = start_stack(num_prefill=3, health_check_interval=0.1, kv_traits=traits)
    come_back(stack.prefill[0], host="203.0.113.5")
    come_back(stack.prefill[1])
    come_back(stack.prefill[2], engine_id="fits")
    wait_for(lambda: bool(stack.decode[0].kv_peers))
    time.sleep(0.5)
    assert [peer["engine_id"] for peer in stack.decode[0].kv_peers] == ["fits"]


def test_stock_engines_are_left_alone(start_stack: StartStack) -> None:
    stack = start_stack(health_check_interval=0.1)
    time.sleep(0.5)
    assert stack.decode[0].kv_peers == []


def test_engines_are_introduced_long_before_the_next_health_check(start_stack: StartStack) -> None:
    stack = start_stack(kv_peer=PEER, health_check_interval=60.0)
    wait_for(lambda: stack.decode[0].kv_peers == [PEER])
