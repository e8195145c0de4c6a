"""Only the engines are left out here: their step intervals are given."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import decode
from bench.engine import EngineJob
from bench.setups import Setup

Intervals = dict[str, dict[int, list[list[float]]]]
"""Setup -> batch of one replica -> one list for each replica."""


def compared(monkeypatch: pytest.MonkeyPatch, given: Intervals, batches: list[int]) -> list[decode.Row]:
    def run(setup: Setup, job: EngineJob, log_dir: Path) -> list[dict[int, list[float]]]:
        steps = given[setup.name]
        return [{share: steps[share][replica] for share in job.batches} for replica in range(setup.num_replicas)]

    monkeypatch.setattr(decode, "_run_replicas", run)
    setups = [Setup.parse(name) for name in given]
    *_, rows = decode.compare("tiny", 64, setups, batches, 4.8e12, Path("unused"))
    return rows


def test_rows_hold_medians_and_ours_its_ratio_to_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = compared(
        monkeypatch,
        {
            "tp4": {8: [[0.010] * 60]},
            "dp4": {2: [[0.004] * 60, [0.005] * 59 + [1.0], [0.004] * 60, [0.004] * 60]},
            "t1p4": {8: [[0.004] * 60]},
        },
        [8],
    )
    assert [(row.setup, row.batch, row.ms_per_step) for row in rows] == [("tp4", 8, 10), ("dp4", 8, 5), ("t1p4", 8, 4)]
    assert [row.tokens_per_second for row in rows] == [800, 1600, 2000]
    assert [row.ratio_to_best_alternative for row in rows] == [None, None, 1.25]
    assert "t1p4" in decode.table(rows)


def test_the_best_alternative_is_sought_at_its_own_largest_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = compared(
        monkeypatch, {"tp4": {8: [[0.01] * 60], 16: [[]]}, "t1p4": {8: [[0.01] * 60], 16: [[0.01] * 60]}}, [8, 16]
    )
    assert [(row.setup, row.batch, row.ratio_to_best_alternative) for row in rows] == [
        ("tp4", 8, None),
        ("t1p4", 8, 1.0),
        ("t1p4", 16, 2.0),
    ]


def test_a_batch_that_replicas_cannot_share_equally_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compared(monkeypatch, {"dp4": {}}, [6]) == []


def test_a_result_below_the_floor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(decode.BelowFloorError, match=r"tp4 at batch 8: a step of 0\.00 ms is below"):
        compared(monkeypatch, {"tp4": {8: [[1e-9] * 60]}}, [8])
