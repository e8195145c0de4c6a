"""From single runs to rows, the summary and the table.

What a request costs is CPU time over requests where answers are whole and come as fast as they go. What a streamed
chunk costs, and a request where few come in a second, is taken from two loads that differ in nothing but the chunks of
a stream: with CPU time c, r requests and e chunks in each, c = a r + b e has one solution (a, b). One has many chunks a
request, the other has two, so that either cost is most of one load's time. Chunks are paced, so that none are read
together with others. A ratio, of costs or of requests a second, is that of two routers in one turn, one after the
other; the median of all turns counts.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from bench.router.load import Result
from bench.router.peers import DIRECT, OURS, Mode

NOISY = 0.10
"""Share of the two cores that others may use in a run that counts, unless all runs had more."""
FAST, PACED, HELD = "fast", "paced", "held"
"""Loads: streams as fast as they go; paced streams; and as many of those as there are, for long."""
WHOLE, LONG, FEW = "whole", "long", "few"
"""Whole answers as fast as they go; paced streams of many chunks, and of few."""
_COST_RATIOS = ("cpu_per_request_ratio", "cpu_per_sparse_request_ratio", "cpu_per_chunk_ratio")
_RATE_RATIO = "requests_per_second_ratio_httpx"
REFERENCE, HTTPX = "vllm-router", "fastapi-httpx"


@dataclass(frozen=True)
class Spread:
    """Median, least and largest of several runs."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        return cls(*(round(f(values), 2) for f in (statistics.median, min, max))) if values else None


@dataclass(frozen=True)
class Row:
    """One router in one mode at one number of streams.

    Added times are the difference to the client that goes straight to the engine, in microseconds. CPU is in
    microseconds, at the number of streams where it was taken apart, None elsewhere; of a request among many, and among
    few, between which a router goes to sleep.
    """

    router: str
    mode: str
    concurrency: int
    requests_per_second: Spread | None
    added_first_token_p50_us: Spread | None
    added_first_token_p99_us: Spread | None
    added_per_token_p50_us: Spread | None
    added_per_token_p99_us: Spread | None
    cpu_per_request_us: Spread | None
    cpu_per_sparse_request_us: Spread | None
    cpu_per_chunk_us: Spread | None
    cpu_per_paced_stream_us: Spread | None
    rss_mib: list[float | None]
    num_errors: int
    num_restarts: int
    num_runs: int
    num_noisy_runs: int


def rows(results: Sequence[Result]) -> list[Row]:
    """One for each router, mode and number of streams, in the order of their first runs."""
    key: Callable[[Result], tuple[str, str, int]] = lambda r: (r.router, r.mode, r.concurrency)  # noqa: E731
    routed = [r for r in results if r.router != DIRECT]
    order = list(dict.fromkeys(key(r) for r in routed))
    found = {k: list(g) for k, g in groupby(sorted(routed, key=key), key)}
    baseline = {
        (r.load, r.concurrency): _quiet([o for o in results if _same_load(o, r)]) for r in results if r.router == DIRECT
    }
    return [_row(found[k], baseline) for k in order]


def _same_load(one: Result, other: Result) -> bool:
    return (one.router, one.load, one.concurrency) == (other.router, other.load, other.concurrency)


def _row(runs: list[Result], baseline: dict[tuple[str, int], list[Result]]) -> Row:
    first = runs[0]
    fast, paced = ([r for r in runs if r.load == name] for name in (FAST, PACED))
    direct = baseline.get((PACED, first.concurrency), [])

    def added(field: str) -> Spread | None:
        base = [v for r in direct if (v := getattr(r, field)) is not None]
        values = [v for r in _quiet(paced) if (v := getattr(r, field)) is not None]
        if not base or not values:
            return None
        return Spread.of([value - statistics.median(base) for value in values])

    costs = _costs(runs).values()
    return Row(
        router=first.router,
        mode=first.mode,
        concurrency=first.concurrency,
        requests_per_second=Spread.of([r.requests_per_second for r in _quiet(fast)]),
        added_first_token_p50_us=added("first_token_p50_us"),
        added_first_token_p99_us=added("first_token_p99_us"),
        added_per_token_p50_us=added("delivery_p50_us"),
        added_per_token_p99_us=added("delivery_p99_us"),
        cpu_per_request_us=Spread.of([cost.request * 1e6 for cost in costs]),
        cpu_per_sparse_request_us=Spread.of([cost.sparse_request * 1e6 for cost in costs]),
        cpu_per_chunk_us=Spread.of([cost.chunk * 1e6 for cost in costs]),
        cpu_per_paced_stream_us=Spread.of(
            [(r.router_cpu_seconds or 0.0) / r.num_requests * 1e6 for r in _quiet(paced) if r.num_requests]
        ),
        rss_mib=[r.rss_after_mib for r in runs],
        num_errors=sum(r.num_errors for r in runs),
        num_restarts=sum(r.died for r in runs),
        num_runs=len(runs),
        num_noisy_runs=sum(r.foreign_cpu > NOISY for r in runs),
    )


class Cost(NamedTuple):
    """Seconds of CPU."""

    request: float
    sparse_request: float
    chunk: float


def _by_turn(runs: Iterable[Result], load: str) -> dict[int, Result]:
    """One router's runs of this load, by the turns that it lived through."""
    return {r.turn: r for r in runs if r.load == load and r.turn is not None and not r.died}


def _costs(runs: Sequence[Result]) -> dict[int, Cost]:
    """By turn, what `cost` makes of it."""
    whole, many, few = (_by_turn(runs, load) for load in (WHOLE, LONG, FEW))
    turns = [turn for turn in whole if turn in many and turn in few]
    found = {turn: cost(whole[turn], many[turn], few[turn]) for turn in turns}
    return {turn: each for turn, each in found.items() if each is not None}


def cost(whole: Result, many: Result, few: Result) -> Cost | None:
    """None where the loads don't tell requests and chunks apart."""
    if whole.router_cpu_seconds is None or many.router_cpu_seconds is None or few.router_cpu_seconds is None:
        return None
    determinant = many.num_requests * few.num_events - few.num_requests * many.num_events
    if not determinant:
        return None
    request = many.router_cpu_seconds * few.num_events - few.router_cpu_seconds * many.num_events
    chunk = many.num_requests * few.router_cpu_seconds - few.num_requests * many.router_cpu_seconds
    each = whole.router_cpu_seconds / max(1, whole.num_requests)
    return Cost(each, request / determinant, chunk / determinant)


def _quiet(runs: Iterable[Result]) -> list[Result]:
    runs = list(runs)
    return [r for r in runs if r.foreign_cpu <= NOISY] or runs


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """The figures by which our router is judged. Each ratio that exists for both modes is the worse one."""
    by_mode = {mode.value: ratios(results, mode) for mode in Mode}
    worst = {
        name: max((found[name].median for found in by_mode.values() if name in found), default=None)
        for name in (*_COST_RATIOS, _RATE_RATIO)  # the httpx proxy has one mode
    }
    ours = [row for row in rows(results) if row.router == OURS]
    largest = max((row.concurrency for row in ours), default=0)
    return {
        **worst,
        "errors_at_2000": sum(r.num_errors for r in ours if r.concurrency == 2000) if largest == 2000 else None,
        "restarts": sum(row.num_restarts for row in ours),
        "by_mode": {mode: {name: asdict(spread) for name, spread in found.items()} for mode, found in by_mode.items()},
        "memory_line_mib": {r.mode: memory_line(r) for r in results if r.load == HELD and r.router == OURS},
    }


def ratios(results: Sequence[Result], mode: Mode) -> dict[str, Spread]:
    """Ours over the reference's CPU, and over the httpx proxy's requests a second, of each turn that both lived
    through."""
    ours, reference, httpx = (
        [r for r in results if (r.router, r.mode) == (name, mode)] for name in (OURS, REFERENCE, HTTPX)
    )
    own, theirs = _costs(ours), _costs(reference)
    pairs = [(each, theirs[turn]) for turn, each in own.items() if turn in theirs]
    found = {
        name: Spread.of([each[which] / other[which] for each, other in pairs if other[which] > 0])
        for which, name in enumerate(_COST_RATIOS)
    }
    fast, slow = _by_turn(ours, FAST), _by_turn(httpx, FAST)
    both = [(run.requests_per_second, slow[turn].requests_per_second) for turn, run in fast.items() if turn in slow]
    found[_RATE_RATIO] = Spread.of([each / other for each, other in both if other > 0])
    return {name: spread for name, spread in found.items() if spread is not None}


def memory_line(held: Result) -> dict[str, Any]:
    """Resident memory from when all streams were open for a round to when the first of the last round end."""
    line = held.rss_line_mib
    steady = [mib for at, mib in line if 2 * held.period <= at <= held.seconds - held.period]
    times = [at for at, _ in line if 2 * held.period <= at <= held.seconds - held.period]
    slope = statistics.linear_regression(times, steady).slope if len(steady) > 1 else None
    return {
        "streams": held.concurrency,
        "requests": held.num_requests,
        "begin": steady[0] if steady else None,
        "end": steady[-1] if steady else None,
        "least": min(steady, default=None),
        "most": max(steady, default=None),
        "seconds": round(times[-1] - times[0], 1) if times else None,
        "mib_per_minute": slope and round(60 * slope, 2),
        "each_second": line,
    }


def table(rows: Sequence[Row]) -> str:
    """For people. A star stands where others used more than a tenth of the two cores in every run."""
    head = (
        f"{'router':15} {'mode':8} {'streams':>7} {'req/s':>8} {'first token +us':>17} {'per token +us':>16} "
        f"{'us/request':>10} {'us/chunk':>8} {'RSS MiB':>8} {'errors':>6}"
    )
    lines = [head, f"{'':15} {'':8} {'':>7} {'':>8} {'p50':>8} {'p99':>8} {'p50':>7} {'p99':>8}"]
    for row in rows:
        noisy = "*" if row.num_noisy_runs == row.num_runs else " "
        rss = row.rss_mib[-1] if row.rss_mib and row.rss_mib[-1] is not None else float("nan")
        lines.append(
            f"{row.router:15} {row.mode:8} {row.concurrency:7} {_cell(row.requests_per_second, 8)} "
            f"{_cell(row.added_first_token_p50_us, 8)} {_cell(row.added_first_token_p99_us, 8)} "
            f"{_cell(row.added_per_token_p50_us, 7)} {_cell(row.added_per_token_p99_us, 8)} "
            f"{_cell(row.cpu_per_request_us, 10)} {_cell(row.cpu_per_chunk_us, 8, 1)} "
            f"{rss:8.0f} {row.num_errors:6}{noisy}"
        )
    return "\n".join(lines)


def _cell(spread: Spread | None, width: int, digits: int = 0) -> str:
    return f"{spread.median:{width}.{digits}f}" if spread is not None else " " * (width - 1) + "-"


def read(path: Path) -> tuple[list[Result], list[dict[str, Any]]]:
    """The runs that a JSON file holds, and the environments in which they were taken; none if there is no such file."""
    if not path.exists():
        return [], []
    known = json.loads(path.read_text())
    return [Result(**run) for run in known["runs"]], [*known["earlier_environments"], known["environment"]]


def record(
    results: Sequence[Result], environment: dict[str, Any], earlier: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """What the JSON file holds."""
    return {
        **summary(results),
        "environment": environment,
        "earlier_environments": list(earlier),
        "rows": [asdict(row) for row in rows(results)],
        "runs": [asdict(result) for result in results],
    }
