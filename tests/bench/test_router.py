"""The benchmark of routers: really run, small, with ours; and what it makes of its runs."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from bench.cli import app
from bench.router import peers, run
from bench.router.load import Load, Result
from bench.router.peers import DIRECT, OURS, Mode
from bench.router.report import FAST, FEW, HELD, LONG, PACED, WHOLE, cost, read, record, rows, summary, table
from bench.router.run import Comparison, Plan, compare
from router.types import Role

RESULT = Result(
    router=OURS,
    mode=Mode.ONE_LEG,
    load=PACED,
    concurrency=64,
    num_events_per_stream=16,
    period=4.0,
    seconds=4.0,
    num_requests=1000,
    num_events=16_000,
    events_per_read=1.0,
    requests_per_second=250.0,
    router_cpu_seconds=0.2 + 16 * 0.02,
    first_token_p50_us=600.0,
    first_token_p99_us=900.0,
    delivery_p50_us=200.0,
    delivery_p99_us=300.0,
    rss_before_mib=60.0,
    rss_peak_mib=64.0,
    rss_after_mib=62.0,
    num_errors=0,
    errors={},
    died=False,
    rss_line_mib=[],
    foreign_cpu=0.01,
    load_cpu=0.4,
)


def runs_of(
    router: str, mode: Mode, per_request: float, per_chunk: float, per_second: float, turn: int = 7
) -> list[Result]:
    """The loads of one turn, whose CPU is what the costs, in seconds, make it."""

    def run(load: str, num_events: int) -> Result:
        cpu = 1000 * per_request + 1000 * num_events * per_chunk
        return replace(
            RESULT,
            router=router,
            mode=mode,
            load=load,
            num_events=1000 * num_events,
            router_cpu_seconds=cpu,
            requests_per_second=per_second,
            turn=turn,
        )

    return [run(FAST, 8), run(WHOLE, 0), run(LONG, 256), run(FEW, 2)]


def test_it_runs(tmp_path: Path) -> None:
    cores = os.sched_getaffinity(0)
    output = tmp_path / "router.json"
    options = ["--quick", "--engines", "2", "--output", str(output), "--log-dir", str(tmp_path)]
    done = CliRunner().invoke(app, ["router", *options])
    assert done.exit_code == 0, done.output
    for log in tmp_path.glob("tknp-*.log"):
        assert [log.read_text().count(f'"{role} engine 127.0.0.1:') for role in Role] == [2, 2], "each says it is up"
    found: dict[str, Any] = json.loads(output.read_text())
    assert {(row["router"], row["mode"], row["concurrency"]) for row in found["rows"]} == {
        (OURS, mode, concurrency) for mode in Mode for concurrency in (8, 64)
    }
    for row in found["rows"]:
        assert row["num_errors"] == row["num_restarts"] == 0
        assert row["requests_per_second"]["median"] > 2  # others may use the machine
        assert row["rss_mib"][-1] > 20
        if row["concurrency"] == 64:
            assert 20 < row["cpu_per_request_us"]["median"] < 50_000
            assert row["added_first_token_p50_us"]["median"] > 0
    assert all(run["num_events"] == run["num_requests"] * run["num_events_per_stream"] for run in found["runs"])
    in_turns = [run for run in found["runs"] if run["turn"] is not None]
    assert [(r["mode"], r["load"]) for r in in_turns] == [(m, load) for m in Mode for load in (FAST, WHOLE, LONG, FEW)]
    for mode in Mode:
        assert len({run["turn"] for run in in_turns if run["mode"] == mode and run["load"] != FAST}) == 1
    assert found["restarts"] == 0 and found["environment"]["not_measured"] == {}
    assert os.sched_getaffinity(0) == cores, "this process stayed pinned to one core"


def test_cost_of_a_request_and_of_a_chunk_are_told_apart() -> None:
    _, whole, many, few = runs_of(OURS, Mode.ONE_LEG, 200e-6, 20e-6, 1000)
    assert cost(whole, many, few) == pytest.approx((200e-6, 200e-6, 20e-6))
    among_many = replace(whole, router_cpu_seconds=0.1)
    assert cost(among_many, many, few) == pytest.approx((100e-6, 200e-6, 20e-6))
    assert cost(whole, many, many) is None, "one load does not tell them apart"


def test_the_summary_compares_like_with_like_and_keeps_the_worse_mode() -> None:
    results = [
        *runs_of(OURS, Mode.ONE_LEG, 180e-6, 30e-6, 4000),
        *runs_of("vllm-router", Mode.ONE_LEG, 100e-6, 20e-6, 9000),
        *runs_of("fastapi-httpx", Mode.ONE_LEG, 900e-6, 80e-6, 400),
        *runs_of(OURS, Mode.TWO_LEG, 400e-6, 30e-6, 2000),
        *runs_of("vllm-router", Mode.TWO_LEG, 160e-6, 25e-6, 5000),
        replace(RESULT, mode=Mode.TWO_LEG, concurrency=2000, num_errors=3, errors={"status 503": 3}),
    ]
    found = summary(results)
    medians = {mode: {name: s["median"] for name, s in found["by_mode"][mode].items()} for mode in found["by_mode"]}
    assert medians == {
        "one-leg": {
            "cpu_per_request_ratio": 1.8,
            "cpu_per_sparse_request_ratio": 1.8,
            "cpu_per_chunk_ratio": 1.5,
            "requests_per_second_ratio_httpx": 10.0,
        },
        "two-leg": {"cpu_per_request_ratio": 2.5, "cpu_per_sparse_request_ratio": 2.5, "cpu_per_chunk_ratio": 1.2},
    }
    assert (found["cpu_per_request_ratio"], found["cpu_per_chunk_ratio"]) == (2.5, 1.5)
    assert found["requests_per_second_ratio_httpx"] == 10.0
    assert found["errors_at_2000"] == 3
    assert record(results, {})["runs"][0]["router"] == OURS
    assert "fastapi-httpx" in table(rows(results))


def test_ratios_are_of_routers_in_the_same_turn() -> None:
    turns = [
        run
        for turn, slowness in enumerate((1, 3, 2))
        for name, per_chunk, rate in ((OURS, 30e-6, 4000), ("vllm-router", 20e-6, 9000), ("fastapi-httpx", 90e-6, 400))
        for run in runs_of(name, Mode.ONE_LEG, slowness * 100e-6, slowness * per_chunk, rate / slowness, turn)
    ]
    alone = runs_of(OURS, Mode.ONE_LEG, 900e-6, 900e-6, 1, turn=1_700_000_000)
    not_in_turns = [replace(RESULT, load=FAST, router=name) for name in (OURS, "fastapi-httpx")]
    # Runs of ours that were added later, or are nobody's, must not shift the pairs, wherever they stand.
    for results in ([*turns, *alone, *not_in_turns], [*not_in_turns, *alone, *turns]):
        found = summary(results)["by_mode"]["one-leg"]
        assert found["cpu_per_chunk_ratio"] == {"median": 1.5, "low": 1.5, "high": 1.5}
        assert found["requests_per_second_ratio_httpx"] == {"median": 10.0, "low": 10.0, "high": 10.0}
    assert summary(not_in_turns)["requests_per_second_ratio_httpx"] is None


def test_the_median_of_turns_counts_and_one_that_a_router_did_not_live_through_does_not() -> None:
    results = [
        replace(run, died=turn == 3 and name == "fastapi-httpx" and run.load == FAST)
        for turn, ratio in enumerate((6, 8, 11, 100))
        for name, rate in ((OURS, ratio * 200), ("fastapi-httpx", 200), ("vllm-router", 5000))
        for run in runs_of(name, Mode.ONE_LEG, 100e-6, 30e-6, rate, turn)
    ]
    found = summary(results)
    assert found["requests_per_second_ratio_httpx"] == 8.0
    spread = {"median": 8.0, "low": 6.0, "high": 11.0}
    assert found["by_mode"]["one-leg"]["requests_per_second_ratio_httpx"] == spread
    died = [replace(run, died=run.load == LONG) for run in results]
    assert summary(died)["cpu_per_request_ratio"] is None


class FakeProcess:
    """A router that does nothing, and dies in its first `whole` load if it is the httpx proxy."""

    port = 1

    def __init__(self, name: str, *_: object) -> None:
        self.name = name
        self.is_alive = True

    def wait_ready(self, request: bytes) -> None:
        pass

    def stop(self) -> None:
        self.is_alive = False


def test_routers_take_turns_at_each_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deaths = ["fastapi-httpx"]
    ran: list[tuple[str, str]] = []

    async def run_load(load: Load, mode: Mode, *args: Any) -> Result:
        process: FakeProcess = args[-1]
        assert process.is_alive
        ran.append((load.name, process.name))
        if died := load.name == WHOLE and process.name in deaths:
            deaths.remove(process.name)
            process.is_alive = False
        return replace(RESULT, router=process.name, mode=mode, load=load.name, concurrency=load.concurrency, died=died)

    for name, fake in (("RouterProcess", FakeProcess), ("run_load", run_load), ("install", lambda _: Path("python"))):
        monkeypatch.setattr(run, name, fake)
    monkeypatch.setattr(run, "versions", lambda _: {})
    monkeypatch.setattr(run, "time", SimpleNamespace(time=count(100.5, 100).__next__))
    both = (OURS, "fastapi-httpx")
    plan = Plan(repeats=0, cost_turns=2, hold_seconds=0, routers=both, modes=(Mode.ONE_LEG,), log_dir=tmp_path)
    kept: list[Comparison] = []
    found = compare(plan, lambda _: None, kept.append)
    fast = [(FAST, name) for name in both]
    first_costs = [(WHOLE, OURS), (WHOLE, "fastapi-httpx"), (LONG, OURS), (FEW, OURS)]
    costs = [(load, name) for load in (WHOLE, LONG, FEW) for name in both]
    assert [(r.turn, r.load, r.router) for r in found.results] == [
        (turn, *each) for turn, loads in ((100, fast), (200, fast), (300, first_costs), (400, costs)) for each in loads
    ]
    for (before, name), (load, measured) in pairwise(ran):
        assert load == "warm-up" or (before, name) == ("warm-up", measured)
    assert {r.concurrency for r in found.results} == {64} and kept[-1] is found


def test_the_memory_line_leaves_out_where_streams_begin_and_end() -> None:
    memory = [*[10.0 * second for second in range(8)], *[50.0 + 0.1 * n for n in range(60)], 30.0, 20.0, 10.0]
    line = [[float(second), mib] for second, mib in enumerate(memory)]
    held = replace(RESULT, load=HELD, seconds=71.0, rss_line_mib=line)
    found = summary([held])["memory_line_mib"]["one-leg"]
    assert (found["begin"], found["end"]) == (50.0, pytest.approx(55.9))
    assert found["mib_per_minute"] == 6.0
    assert found["each_second"] == line


def test_runs_can_be_added_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "router.json"
    assert read(path) == ([], [])
    first, second = (runs_of(OURS, Mode.ONE_LEG, 180e-6, 30e-6, rate) for rate in (1000, 3000))
    path.write_text(json.dumps(record(first, {"at": "then"})))
    before, parts = read(path)
    found = record([*before, *second], {"at": "now"}, parts)
    assert [run["requests_per_second"] for run in found["runs"]] == [1000] * 4 + [3000] * 4
    assert (found["environment"], found["earlier_environments"]) == ({"at": "now"}, [{"at": "then"}])


def test_added_times_are_differences_to_the_client_without_a_router() -> None:
    direct = replace(RESULT, router=DIRECT, first_token_p50_us=100.0, delivery_p99_us=120.0)
    (row,) = rows([direct, RESULT])
    assert row.added_first_token_p50_us is not None and row.added_first_token_p50_us.median == 500.0
    assert row.added_per_token_p99_us is not None and row.added_per_token_p99_us.median == 180.0


def test_runs_that_others_disturbed_count_only_if_there_are_no_others() -> None:
    fast = replace(RESULT, load=FAST, requests_per_second=1000.0)
    noisy = replace(fast, requests_per_second=300.0, foreign_cpu=0.5)
    (row,) = rows([fast, noisy])
    assert row.requests_per_second is not None and row.requests_per_second.low == 1000.0
    assert (row.num_runs, row.num_noisy_runs) == (2, 1)
    (row,) = rows([noisy, noisy])
    assert row.requests_per_second is not None and row.requests_per_second.median == 300.0


def test_peers_that_cannot_be_had_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "REQUIREMENTS", ("tknp-no-such-package==1.0",))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(peers.PeersMissingError, match=r"can't be installed into .*measure only ours"):
        peers.install(tmp_path / "peers")


def test_paced_loads_keep_the_rate_within_what_a_router_can_do() -> None:
    for load in (*Plan().loads(), *Plan().cost_loads(), Plan().held_load()):
        if load.period and load.concurrency > 1:
            assert load.concurrency / (load.ramp or load.period) <= 250
            assert load.interval * load.num_events == pytest.approx(load.period)
    assert Load(PACED, 1, 16, 3.0, 0.032).num_rounds == 94
