from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from router.lifetime import Moment, Phase, RequestRecord
from router.status import MAX_RECORDS, percentile, rates, times
from router.types import Api, Outcome
from tests.router.conftest import Stack, StartStack
from tests.router.running import wait_for


def ended(at: float, outcome: Outcome = Outcome.OK, chunks: int = 10) -> RequestRecord:
    """A streamed request that took a second."""
    record = RequestRecord("a", Api.CHAT, outcome=outcome, num_chunks=chunks, last=Moment.LAST_TOKEN)
    record.moments = {
        Moment.RECEIVED: at - 1.0,
        Moment.PREFILL_SENT: at - 0.9,
        Moment.PREFILL_DONE: at - 0.7,
        Moment.DECODE_SENT: at - 0.6,
        Moment.TRANSFER_BEGIN: at - 0.55,
        Moment.TRANSFER_END: at - 0.5,
        Moment.FIRST_TOKEN: at - 0.4,
        Moment.LAST_TOKEN: at,
    }
    record.last = Moment.LAST_TOKEN
    return record


def test_rates_are_over_ten_seconds() -> None:
    records = [ended(100.0), ended(95.0, Outcome.FAILED), ended(89.0)]
    assert rates(records, 100.0) == {"requests": 0.2, "chunks": 2.0, "by_outcome": {"ok": 0.1, "failed": 0.1}}
    assert rates([], 100.0)["requests"] == 0


def test_rates_of_more_requests_than_are_kept() -> None:
    records = [ended(100.0 - i / 1000) for i in range(MAX_RECORDS)]
    assert rates(records, 100.0)["requests"] == pytest.approx(1000, rel=0.01)


def test_times_of_the_hand_over() -> None:
    found = times([ended(100.0), ended(50.0), ended(10.0, Outcome.FAILED)])
    assert found["hand_over"] == {"p50": 0.15, "p95": 0.15, "count": 2}
    assert found["time_to_first_token"]["p50"] == pytest.approx(0.6)
    assert {phase.value for phase in Phase} - {"answer", "queue"} == found.keys() - {"hand_over", "time_to_first_token"}


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50), (0.95, 95), (1.0, 100), (0.001, 1)])
def test_percentiles_by_nearest_rank(share: float, expected: int) -> None:
    assert percentile(list(range(100, 0, -1)), share) == expected
    assert percentile([7], share) == 7


def rank(number: int, free: int) -> dict[str, Any]:
    return {"rank": number, "num_blocks": 10, "num_free_blocks": free, "num_requests": 1, "step_seconds": 1.0}


def test_the_status_of_everything(start_stack: StartStack) -> None:
    stack = start_stack(num_decode=2)
    stack.decode[0].token_parallel = {"efficiency": 0.75, "ranks": [rank(1, 5), rank(0, 10), rank(0, 10)]}
    stack.prefill[
        0
    ].metrics_text = 'vllm:kv_cache_usage_perc{engine="0"} 0.25\nvllm:kv_cache_usage_perc{engine="1"} 0.75\n'
    stack.decode[1].kill()
    wait_for(lambda: not stack.router.state.pool.engines[2].is_up)
    stack.router.complete(stream=True)
    told = stack.router.call("GET", "/status").json()
    prefill, decode, dead = told["engines"]
    assert (prefill["kv_used"], prefill["ranks"]) == (0.5, [])
    assert [(r["rank"], r["kv_used"]) for r in decode["ranks"]] == [(0, 0.0), (1, 0.5)]
    assert (decode["efficiency"], decode["kv_used"]) == (0.75, 0.25)
    assert (dead["up"], dead["kv_used"]) == (False, None)
    assert "can't be reached" in dead["reason"]
    assert told["ready"] is True
    assert told["seconds"]["prefill"]["count"] == 1
    assert told["rates"]["by_outcome"] == {"ok": 0.1}
    assert set(told["in_flight"].values()) == {0}
    assert told["guard"] == {"share": 0.0, "counts": {}, "recent": []}


def test_many_readers_cost_one_look(start_stack: StartStack) -> None:
    stack = start_stack(kv_poll_interval=600.0)
    with ThreadPoolExecutor(16) as threads:
        bodies = [a.body for a in threads.map(lambda _: stack.router.call("GET", "/status"), range(32))]
    assert len(set(bodies)) <= 2
    assert stack.decode[0].num_looks <= 4


def test_an_engine_that_does_not_answer_holds_nobody_up(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.status.POLL_TIMEOUT", 0.2)
    stack.decode[0].is_mute = True
    begin = time.monotonic()
    told = stack.router.call("GET", "/status").json()
    assert time.monotonic() - begin < 2
    assert [engine["kv_used"] for engine in told["engines"]] == [None, None]
