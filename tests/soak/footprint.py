"""What the processes of a soak take, over time: memory, and the router's tasks and open files."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from tests.e2e.processes import Service
from tests.soak.engines import SoakEngine
from tknp.launch.guard import descendants

NUM_POINTS = 60  # of each line, in the summary


@dataclass(frozen=True)
class Handles:
    """What a request that leaked keeps in the router."""

    num_files: int
    num_tasks: int

    @classmethod
    def of(cls, router: Service) -> Handles:
        pids = descendants(router.process.pid)
        num_files = sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids)
        return cls(num_files, int(router.metric("tknp_event_loop_tasks")))

    def more_than(self, before: Handles) -> list[str]:
        """A line for each kind. Idle connections to engines close after some seconds, and checks come and go."""
        found = []
        if self.num_files > before.num_files + 8:
            found.append(f"router: {self.num_files} open files, {before.num_files} before")
        if self.num_tasks > before.num_tasks + 4:
            found.append(f"router: {self.num_tasks} tasks, {before.num_tasks} before")
        return found


@dataclass
class Footprint:
    """One value each time that it is measured; an engine's falls where it was killed."""

    router_mib: list[float] = field(default_factory=list)
    router_tasks: list[int] = field(default_factory=list)
    engine_mib: dict[str, list[float]] = field(default_factory=dict)

    def measure_router(self, router: Service) -> float:
        """Resident memory in MiB: that of the largest process, as the guard beside it is a small one."""
        mib = max(_resident_mib(pid) for pid in (router.process.pid, *descendants(router.process.pid)))
        self.router_mib.append(round(mib, 1))
        return mib

    def measure_rest(self, router: Service, engines: Sequence[SoakEngine]) -> None:
        """The router's tasks, and the resident memory of all of an engine's processes."""
        with suppress(requests.RequestException):  # the router has ended, which the summary says
            self.router_tasks.append(int(router.metric("tknp_event_loop_tasks")))
        for engine in engines:
            pids = (engine.service.process.pid, *descendants(engine.service.process.pid))
            self.engine_mib.setdefault(engine.name, []).append(round(sum(map(_resident_mib, pids))))

    def as_dict(self) -> dict[str, Any]:
        return {
            "router_mib": memory_growth(self.router_mib),
            "router_tasks": _thinned(self.router_tasks),
            "engine_mib": {name: _thinned(line) for name, line in self.engine_mib.items()},
        }


def memory_growth(mib: Sequence[float]) -> dict[str, Any]:
    """Resident memory of the second quarter against the last: what comes before is caches that fill, such as the
    records of the last thousand requests."""
    quarter = len(mib) // 4
    if quarter < 3:
        return {"is_flat": True, "line": list(mib)}
    early = statistics.median(mib[quarter : 2 * quarter])
    late = statistics.median(mib[-quarter:])
    return {
        "is_flat": late - early <= 4 + 0.05 * early,
        "early": early,
        "late": late,
        "peak": max(mib),
        "line": _thinned(mib),
    }


def _thinned(line: Sequence[float]) -> list[float]:
    return list(line[:: max(1, len(line) // NUM_POINTS)])


def _resident_mib(pid: int) -> float:
    """0 for a process that has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (OSError, IndexError):
        return 0.0
