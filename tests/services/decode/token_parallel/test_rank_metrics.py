from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import REGISTRY

from services.decode.token_parallel.rank_metrics import RankMetrics, efficiency_between


def status(rank: int, step: float, wait: float) -> dict[str, Any]:
    return {"rank": rank, "step_seconds": step, "wait_seconds": wait}


START = [status(0, 0, 0), status(1, 0, 0)]


def test_efficiency_is_busy_time_over_ranks_times_the_root_s_step_time() -> None:
    # Root: 10 s in steps, 2 waiting. KV worker: took part for 6 s, 2 of them waiting. (8 + 4) / (2 * 10)
    assert efficiency_between(START, [status(0, 10, 2), status(1, 6, 2)]) == pytest.approx(0.6)


def test_only_what_passed_since_the_last_poll_counts() -> None:
    before = [status(0, 100, 90), status(1, 50, 50)]
    assert efficiency_between(before, [status(0, 110, 90), status(1, 60, 50)]) == pytest.approx(1.0)


def test_an_idle_rank_pulls_the_efficiency_down() -> None:
    assert efficiency_between(START, [status(0, 10, 0), status(1, 0, 0)]) == pytest.approx(0.5)


def test_without_a_step_there_is_no_efficiency() -> None:
    assert efficiency_between(START, START) is None


def test_tensor_parallel_roots_count_as_one_clock() -> None:
    before = [status(0, 0, 0), status(0, 0, 0), status(1, 0, 0), status(1, 0, 0)]
    after = [status(0, 10, 5), status(0, 10, 5), status(1, 5, 0), status(1, 5, 0)]
    assert efficiency_between(before, after) == pytest.approx(0.5)


def test_it_never_leaves_the_range_of_a_share() -> None:
    assert efficiency_between(START, [status(0, 1, 0), status(1, 5, 0)]) == 1.0
    assert efficiency_between(START, [status(0, 1, 9), status(1, 0, 0)]) == 0.0


@pytest.fixture
def metrics() -> Iterator[RankMetrics]:
    before = set(REGISTRY._collector_to_names)
    yield RankMetrics()
    for collector in set(REGISTRY._collector_to_names) - before:
        REGISTRY.unregister(collector)


def test_gauges_carry_the_rank_and_the_names_of_the_interface(metrics: RankMetrics) -> None:
    keys = ("num_blocks", "num_free_blocks", "num_requests", "step_seconds", "wait_seconds", "parameter_bytes")
    ranks = [{"rank": r, "kv_cache_bytes": 4096, **{key: 10 * r + i for i, key in enumerate(keys)}} for r in (0, 1)]
    metrics.update(ranks, None)
    assert REGISTRY.get_sample_value("tknp_rank_kv_blocks_free", {"rank": "1"}) == 11
    assert REGISTRY.get_sample_value("tknp_rank_requests", {"rank": "0"}) == 2
    assert REGISTRY.get_sample_value("tknp_rank_kv_cache_bytes", {"rank": "1"}) == 4096
    metrics.update(ranks, 0.75)
    assert REGISTRY.get_sample_value("token_parallel_efficiency") == 0.75
    metrics.update(ranks, None)
    assert REGISTRY.get_sample_value("token_parallel_efficiency") == 0.75
