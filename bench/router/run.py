"""Runs the comparison: every router by itself, the same loads one after the other, several times."""

from __future__ import annotations

import asyncio
import os
import platform
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import uvloop

from bench.router.engine import FakeEngine
from bench.router.load import Load, Result, pin, request_body, run_load
from bench.router.peers import (
    DIRECT,
    OURS,
    REQUIREMENTS,
    ROUTERS,
    Mode,
    PeersMissingError,
    Router,
    Start,
    install,
    versions,
)
from bench.router.process import API_KEY, RouterFailedError, RouterProcess
from bench.router.report import FAST, FEW, HELD, LONG, PACED, WHOLE
from tknp import __version__
from tknp.common.ports import free_port

STREAMS_PER_SECOND = 250.0
"""Of paced loads, at most: a quarter to a half of what one core of our router does."""
TURN_CONCURRENCY = 64
"""Streams at once of the loads at which routers take turns."""


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    concurrencies: tuple[int, ...] = (1, 64, 512, 2000)
    repeats: int = 3
    cost_turns: int = 5  # so often routers are measured in turns: what a request and a chunk cost, and the rate
    seconds: float = 3.0
    hold_seconds: float = 120.0  # the most streams at once; 0 for not
    num_events: int = 16
    num_long_events: int = 256
    num_engines: int = 1  # of each kind
    routers: tuple[str, ...] = ()  # names; empty is all
    modes: tuple[str, ...] = ()
    our_options: tuple[str, ...] = ()
    peers_dir: Path = Path(".venv-peers")
    log_dir: Path = Path("logs/bench-router")

    @classmethod
    def quick(cls) -> Plan:
        """A smoke test: ours alone, seconds."""
        return cls((8, 64), repeats=1, cost_turns=1, seconds=0.5, hold_seconds=0, num_long_events=32, routers=("tknp",))

    def loads(self, most_streams: int | None = None, repeat: int = 0) -> Iterator[Load]:
        """Of the turn number `repeat`: large loads take long and vary little, so they have half as many turns."""
        for concurrency in self.concurrencies:
            if concurrency > TURN_CONCURRENCY and 2 * repeat > self.repeats:
                continue
            if most_streams is not None and concurrency > most_streams:
                continue
            # Few streams don't reach the rate: one at a time gets its events 2 ms apart, others last half a second.
            period = max(concurrency / STREAMS_PER_SECOND, 0.5) if concurrency > 1 else 0.002 * self.num_events
            if concurrency != TURN_CONCURRENCY:  # there it is measured in turns
                yield Load(FAST, concurrency, 8, self.seconds)
            yield Load(PACED, concurrency, self.num_events, self.seconds, period)

    def fast_load(self) -> Load:
        return Load(FAST, TURN_CONCURRENCY, 8, self.seconds)

    def cost_loads(self) -> tuple[Load, Load, Load]:
        """Whole answers as fast as they go; nearly all chunks, as far apart in a stream as in the paced load; and
        nearly all requests."""
        period = 0.5 * self.num_long_events / self.num_events
        ramp = TURN_CONCURRENCY / STREAMS_PER_SECOND  # its moments fall between those of the chunks
        long = Load(LONG, TURN_CONCURRENCY, self.num_long_events, period, period, ramp)
        whole = Load(WHOLE, TURN_CONCURRENCY, 0, self.seconds)
        return whole, long, Load(FEW, TURN_CONCURRENCY, 2, 2 * self.seconds, 0.5)

    def held_load(self) -> Load:
        most = max(self.concurrencies)
        return Load(HELD, most, self.num_events, self.hold_seconds, most / STREAMS_PER_SECOND)

    def chosen(self) -> list[Router]:
        named = [r for r in ROUTERS if not self.routers or r.name in self.routers]
        return [r for r in named if (not self.modes or r.mode in self.modes) and (r.chooses or self.num_engines == 1)]


@dataclass(frozen=True)
class Comparison:
    results: list[Result]
    environment: dict[str, Any]


def compare(plan: Plan, tell: Callable[[str], None], keep: Callable[[Comparison], None]) -> Comparison:
    """Measures everything in the plan.

    Args:
        tell: gets one line for each step.
        keep: gets what is known after each router, so that an interrupted run leaves what it had.
    """
    chosen = plan.chosen()
    not_measured: dict[str, str] = {}
    python = Path()
    if any(not router.is_ours for router in chosen):
        tell(f"Installing {', '.join(REQUIREMENTS[:4])} and what they need into {plan.peers_dir}")
        try:
            python = install(plan.peers_dir.absolute())
        except PeersMissingError as error:
            tell(str(error))
            not_measured = {f"{r.name} {r.mode}": str(error) for r in chosen if not r.is_ours}
            chosen = [router for router in chosen if router.is_ours]
    environment = {**_environment(plan), "not_measured": not_measured}
    if python.name:
        environment["versions"] |= versions(python)
    known = Comparison([], environment)
    with _two_cores() as cores:
        uvloop.run(_compare(plan, chosen, python, cores, known, tell, keep))
    return known


async def _compare(
    plan: Plan,
    routers: Sequence[Router],
    python: Path,
    cores: tuple[int, int],
    known: Comparison,
    tell: Callable[[str], None],
    keep: Callable[[Comparison], None],
) -> None:
    engines = FakeEngine(plan.num_engines), FakeEngine(plan.num_engines)
    for engine in engines:
        await engine.start()
    try:
        known.results.extend(await _direct(plan, engines, cores, tell))
        for router in routers:
            left_out = [n for n in plan.concurrencies if router.most_streams and n > router.most_streams]
            if left_out:
                why = f"it does not hold its rate with more than {router.most_streams} streams at once"
                known.environment["not_measured"] |= {f"{router.name} {router.mode} {n}": why for n in left_out}
            try:
                known.results.extend(await _measure(plan, router, python, engines, cores, tell))
            except RouterFailedError as error:
                tell(str(error))
                known.environment["not_measured"][f"{router.name} {router.mode}"] = str(error)
            keep(known)
        for mode in Mode:
            chosen = [router for router in routers if router.mode is mode]
            known.results.extend(await _measure_in_turns(plan, chosen, python, engines, cores, tell))
            keep(known)
    finally:
        for engine in engines:
            await engine.stop()


async def _direct(
    plan: Plan, engines: tuple[FakeEngine, FakeEngine], cores: tuple[int, int], tell: Callable[[str], None]
) -> list[Result]:
    """The client straight to the engine: what every added time is measured from."""
    results = []
    for repeat in range(plan.repeats):
        for load in plan.loads(repeat=repeat):
            result = await run_load(load, Mode.ONE_LEG, engines, engines[1].ports[0], cores)
            tell(_line(result))
            results.append(result)
    return results


async def _measure(
    plan: Plan,
    router: Router,
    python: Path,
    engines: tuple[FakeEngine, FakeEngine],
    cores: tuple[int, int],
    tell: Callable[[str], None],
) -> list[Result]:
    """One router, in one life unless it dies; its memory is followed over all repeats."""
    results: list[Result] = []
    process: RouterProcess | None = None
    try:
        for repeat in range(plan.repeats):
            for load in plan.loads(router.most_streams, repeat):
                if process is None or not process.is_alive:
                    process = await _start(plan, router, python, engines, cores)
                results.append(await _told(load, router, engines, cores, process, tell))
        if router.name == OURS and plan.hold_seconds and process is not None and process.is_alive:
            results.append(await _told(plan.held_load(), router, engines, cores, process, tell))
    finally:
        if process is not None:
            await asyncio.to_thread(process.stop)
    return results


async def _measure_in_turns(
    plan: Plan,
    routers: Sequence[Router],
    python: Path,
    engines: tuple[FakeEngine, FakeEngine],
    cores: tuple[int, int],
    tell: Callable[[str], None],
) -> list[Result]:
    """The routers of one mode, all of them up, take turns at each load, so that whatever else the machine does meets
    all of them alike."""
    results: list[Result] = []
    processes: dict[str, RouterProcess] = {}
    try:
        # All turns of `fast` first: a request of the httpx proxy costs the more, the more connections its pool holds,
        # and later loads leave more of them there. It is compared at its best.
        for loads, number in product(((plan.fast_load(),), plan.cost_loads()), range(plan.cost_turns)):
            for router in routers:
                if router.name in processes and processes[router.name].is_alive:
                    continue
                try:
                    processes[router.name] = await _start(plan, router, python, engines, cores)
                except RouterFailedError as error:
                    tell(f"Turn {number}: {error}")
            turn = int(time.time())
            for load, router in product(loads, routers):
                process = processes.get(router.name)
                if process is not None and process.is_alive:  # one that died is back in the next turn
                    await _warm_up(router, engines, cores, process)  # while others ran, its connections may have ended
                    result = await _told(load, router, engines, cores, process, tell)
                    results.append(replace(result, turn=turn))
    finally:
        for process in processes.values():
            await asyncio.to_thread(process.stop)
    return results


async def _start(
    plan: Plan, router: Router, python: Path, engines: tuple[FakeEngine, FakeEngine], cores: tuple[int, int]
) -> RouterProcess:
    """It has answered requests when this returns. Raises RouterFailedError."""
    prefill, decode = engines
    start = Start(python, free_port(), free_port(), prefill.urls, decode.urls, keys_file(plan), plan.our_options)
    log = plan.log_dir / f"{router.name}-{router.mode}.log"
    process = RouterProcess(router.name, router.command(start), start.port, cores[0], log)
    try:
        await asyncio.to_thread(process.wait_ready, request_body(router.mode, 0))
        await _warm_up(router, engines, cores, process)
    except BaseException:
        await asyncio.to_thread(process.stop)
        raise
    return process


async def _warm_up(
    router: Router, engines: tuple[FakeEngine, FakeEngine], cores: tuple[int, int], process: RouterProcess
) -> None:
    await run_load(Load("warm-up", 8, 8, 0.5), router.mode, engines, process.port, cores, process)


async def _told(
    load: Load,
    router: Router,
    engines: tuple[FakeEngine, FakeEngine],
    cores: tuple[int, int],
    process: RouterProcess,
    tell: Callable[[str], None],
) -> Result:
    result = await run_load(load, router.mode, engines, process.port, cores, process)
    tell(_line(result))
    return result


def keys_file(plan: Plan) -> Path:
    """The API keys that our router is to know, beside its output."""
    path = plan.log_dir.absolute() / "keys.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(API_KEY + "\n")
    return path


@contextmanager
def _two_cores() -> Iterator[tuple[int, int]]:
    """The router's core and this process's, to which it is pinned for as long as the block runs."""
    allowed = sorted(os.sched_getaffinity(0))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))  # two sockets a stream; routers inherit it
    try:
        pin(allowed[-1])
        yield allowed[0], allowed[-1]
    finally:
        os.sched_setaffinity(0, allowed)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def _line(result: Result) -> str:
    cpu = f", {result.router_cpu_seconds:.2f} s of CPU" if result.router != DIRECT else ""
    errors = f", ERRORS {result.errors}" if result.errors else ""
    died = ", DIED" if result.died else ""
    return (
        f"{result.router} {result.mode} {result.load} {result.concurrency}: {result.num_requests} requests, "
        f"{result.requests_per_second:.0f}/s{cpu}, others used {result.foreign_cpu:.0%}{errors}{died}"
    )


def _environment(plan: Plan) -> dict[str, Any]:
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    settings = {name: v for name, v in asdict(plan).items() if not isinstance(v, Path)}  # folders are nobody's business
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu,
        "num_cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {"tknp": __version__, "uvloop": version("uvloop")},
        "plan": settings,
        "loads": [asdict(load) for load in (*plan.loads(), plan.fast_load(), *plan.cost_loads(), plan.held_load())],
    }
