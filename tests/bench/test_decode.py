"""Only the engines are left out here: their step intervals are given."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from bench import cli, decode
from bench.engine import EngineJob, misfit
from bench.setups import Setup

Intervals = dict[str, dict[int, list[list[float]]]]
"""Setup -> batch of one replica -> one list for each replica."""


def compared(monkeypatch: pytest.MonkeyPatch, given: Intervals, batches: list[int]) -> decode.Measured:
    """Steps at 64 tokens, half as long at 128; `t1p4` does not fit at 128 tokens, and `tp2dcp2` does not run."""

    def run(setup: Setup, job: EngineJob, log_dir: Path) -> list[list[dict[str, Any]]]:
        if setup.decode_context_parallel_size > 1:
            raise subprocess.CalledProcessError(1, "engine")
        return [
            [
                {"start": {"engine_seconds": 60.0}},
                *(
                    {"context": context, "batch": share, "intervals": [s * 64 / context for s in steps]}
                    for share in job.batches
                    for context in job.contexts
                    for steps in (given[setup.name][share][replica],)
                    if (setup.name, context) != ("t1p4", 128)
                ),
            ]
            for replica in range(setup.num_replicas)
        ]

    monkeypatch.setattr(decode, "_run_replicas", run)
    setups = tuple(Setup.parse(name) for name in given)
    *_, measured = decode.compare(decode.Plan("tiny", (64, 128), setups, tuple(batches), Path("unused")))
    return measured


def short_rows(measured: decode.Measured) -> list[decode.Row]:
    return [row for row in measured.rows if row.context == 64]


def test_rows_hold_medians_and_ours_its_ratio_to_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = compared(
        monkeypatch,
        {
            "tp4": {8: [[0.010] * 60]},
            "dp4": {2: [[0.004] * 60, [0.005] * 59 + [1.0], [0.004] * 60, [0.004] * 60]},
            "t1p4": {8: [[0.004] * 60]},
        },
        [8],
    )
    rows = short_rows(measured)
    assert [(row.setup, row.batch, row.ms_per_step) for row in rows] == [("tp4", 8, 10), ("dp4", 8, 5), ("t1p4", 8, 4)]
    assert [row.tokens_per_second for row in rows] == [800, 1600, 2000]
    assert [row.ratio_to_best_alternative for row in rows] == [None, None, 1.25]
    assert "t1p4" in decode.table(rows)
    assert measured.starts["tiny t1p4"] == {"engine_seconds": 60.0}
    assert len(measured.rows) == 5 and not measured.refused


def test_the_best_alternative_is_sought_at_its_own_largest_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = compared(
        monkeypatch, {"tp4": {8: [[0.01] * 60], 16: [[]]}, "t1p4": {8: [[0.01] * 60], 16: [[0.01] * 60]}}, [8, 16]
    )
    assert [(row.setup, row.batch, row.ratio_to_best_alternative) for row in short_rows(measured)] == [
        ("tp4", 8, None),
        ("t1p4", 8, 1.0),
        ("t1p4", 16, 2.0),
    ]
    assert measured.refused[0] == "tiny tp4: at 64 tokens only 0 steps had all of batch 16; give more --steps"


@pytest.mark.parametrize(
    ("job", "batch", "why"),
    [
        # 1,000 blocks of 16 tokens; 64 + 16 tokens are 5 of them.
        (EngineJob("tiny", (64,), 1, 1, (), num_tokens=16), 199, None),
        (EngineJob("tiny", (64,), 1, 1, (), num_tokens=16), 200, "1,000 blocks of 16 tokens where there are 999"),
        (EngineJob("tiny", (64,), 2, 1, (), 2, num_tokens=16), 333, None),  # blocks of 32 tokens
        (EngineJob("tiny", (64,), 1, 4, (), num_tokens=16), 199, None),
        # Of four ranks each has 250 blocks, one of which is the null block.
        (EngineJob("tiny", (64,), 1, 4, (), variant="spread", num_tokens=16), 196, None),
        (EngineJob("tiny", (64,), 1, 4, (), variant="spread", num_tokens=16), 197, "250 blocks of 16 tokens"),
    ],
)
def test_a_batch_that_does_not_fit_is_left_out(job: EngineJob, batch: int, why: str | None) -> None:
    parallel = SimpleNamespace(decode_context_parallel_size=job.decode_context_parallel_size)
    cache = SimpleNamespace(block_size=16, num_gpu_blocks=1000)
    config = SimpleNamespace(parallel_config=parallel, cache_config=cache)
    found = misfit(SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config)), job, 64, batch)
    assert (found is None) if why is None else (found is not None and why in found)


def test_what_a_record_holds_beside_rows_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    record.write_text(json.dumps({"rows": [], "earlier_rows": [1]}))
    monkeypatch.setattr(decode, "compare", lambda plan: [decode.Measured(left_out=["t1p2: too large"])])
    given = ["decode", "--setup", "t1p2", "--output", str(record), "--log-dir", str(tmp_path)]
    result = CliRunner().invoke(cli.app, given)
    assert result.exit_code == 0, result.output
    assert "t1p2: too large" in result.output
    assert json.loads(record.read_text())["earlier_rows"] == [1]


def test_a_batch_that_replicas_cannot_share_equally_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compared(monkeypatch, {"dp4": {}}, [6]).rows == []


def test_what_cannot_be_true_or_did_not_run_is_refused_and_the_rest_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    given: Intervals = {"tp4": {8: [[1e-9] * 60]}, "tp2dcp2": {}, "dp4": {2: [[0.01] * 60] * 4}}
    measured = compared(monkeypatch, given, [8])
    assert {row.setup for row in measured.rows} == {"dp4"}
    assert "tiny tp4: at batch 8 and 64 tokens a step of 0.00 ms is below" in measured.refused[0]
    assert "tiny tp2dcp2: an engine ended with 1" in measured.refused[-1]


def test_ours_stands_beside_itself_without_overlap_and_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"t1p4": 0.010, "t1p4-serial": 0.012, "t1p4-piecewise": 0.015}
    measured = compared(monkeypatch, {name: {8: [[step] * 60]} for name, step in given.items()}, [8])
    line = decode.differences(measured.rows).splitlines()[1].split()
    assert line == ["t1p4", "64", "8", "10.00", "12.00", "(+20.0%)", "15.00", "(+50.0%)"]
    assert decode.differences(measured.rows[:1]) == ""


def test_a_repeated_option_takes_several_values(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plans: list[decode.Plan] = []

    def remember(plan: decode.Plan) -> list[decode.Measured]:
        plans.append(plan)
        return []

    monkeypatch.setattr(decode, "compare", remember)
    options = ["--setup", "t1p2", "dp2", "--batch", "1", "64", "256", "--shape", "tiny", "--context", "64", "--batch=8"]
    result = CliRunner().invoke(cli.app, ["decode", *options, "--log-dir", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert [setup.name for setup in plans[0].setups] == ["t1p2", "dp2"]
    assert (plans[0].batches, plans[0].contexts, plans[0].shape) == ((1, 64, 256, 8), (64,), "tiny")


def test_a_plot_is_refused_before_anything_runs(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["decode", "--plot", str(tmp_path / "plot.svg")])
    assert result.exit_code == 2
    assert "--plot draws what --output holds" in result.output
