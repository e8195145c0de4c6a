"""How long engines and their workers rest while there is nothing to compute."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from kv_transfer import spin
from tests.kv_transfer.pair import Pair, prompt, run


def test_workers_sleep_between_steps_while_there_is_nothing_but_leases(pair: Callable[..., Pair]) -> None:
    both = pair()
    tokens = prompt(100, 31)
    params = both.offer(tokens)
    both.prefill.step()
    assert spin._is_resting
    assert both.hand_over(tokens, params) == 1
    both.settle()
    both.prefill.step()
    assert not spin._is_resting


def test_the_older_a_lease_the_less_often_an_engine_looks(both: Pair) -> None:
    connector = both.prefill.scheduler.connector
    tokens = prompt(100, 30)
    params = both.offer(tokens)
    rests = []
    for age in (0.0, 2.0, 60.0):
        connector.connector_scheduler._last_ended = time.monotonic() - age
        rests.append(connector.rest_seconds(False))
    assert rests == pytest.approx([0.05, 0.5, 1.0], abs=0.05)
    assert connector.rest_seconds(True) < min(rests)
    assert both.hand_over(tokens, params) == 1
    both.settle()


def test_an_engine_does_not_rest_when_kv_cache_has_arrived(both: Pair) -> None:
    tokens = prompt(100, 31)
    connector = both.decode.scheduler.connector
    both.decode.add("arrives", tokens, 1, both.offer(tokens))

    def has_arrived() -> bool:
        arrived = bool(both.decode.scheduler.finished_recving_kv_req_ids)
        assert (connector.rest_seconds(True) == 0) == arrived
        return arrived

    run(both.decode, until=has_arrived)
    both.decode.step()
    assert connector.rest_seconds(True) > 0
    both.settle()
