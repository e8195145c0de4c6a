"""Runs the engines of some cases, each on GPUs of its own, as many at once as there are GPUs for."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.gpu.cases import Case
from tests.gpu.compare import Answer, Comparison, compare, verdict
from tests.gpu.engine import EngineSpec
from tests.gpu.models import make_model
from tknp.common.devices import visible_devices

START_AND_RUN_SECONDS = 400
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    """Of one engine; `error` is the end of its log if it failed."""

    answers: list[Answer]
    preemptions: int = 0
    prefix_hits: int = 0
    micro_batches: tuple[int, ...] = (1,)
    error: str = ""


class Devices:
    """GPUs that are lent: one of plain vLLM to several engines at once, ours to one, because a kernel that waits for
    another GPU's needs that one to run at the same time."""

    ENGINES = 3
    """Plain ones on one GPU."""

    def __init__(self, count: int) -> None:
        self._free = [self.ENGINES] * count
        self._changed = threading.Condition()

    @contextmanager
    def lent(self, count: int) -> Iterator[list[int]]:
        """Waits for `count` GPUs, or for room on one, and gives them back."""
        share = 1 if count == 1 else self.ENGINES
        with self._changed:
            self._changed.wait_for(lambda: len(self._with_room(share)) >= count)
            mine = self._with_room(share)[:count]
            self._take(mine, share)
        try:
            yield sorted(mine)
        finally:
            with self._changed:
                self._take(mine, -share)
                self._changed.notify_all()

    def _with_room(self, share: int) -> list[int]:
        roomy = [gpu for gpu, free in enumerate(self._free) if free >= share]
        return sorted(roomy, key=lambda gpu: -self._free[gpu])

    def _take(self, gpus: Sequence[int], share: int) -> None:
        for gpu in gpus:
            self._free[gpu] -= share


class Runs:
    """The outcomes of engines, each of which runs once however many cases want it."""

    def __init__(self, cases: Iterable[Case], num_gpus: int, directory: Path) -> None:
        engines = {engine.name: engine for case in cases for engine in case.engines}
        models = {engine.model: make_model(directory, engine.model) for engine in engines.values()}
        devices = Devices(num_gpus)
        # Large ones first, or they would wait for a moment in which no small one runs.
        order = sorted(engines.values(), key=lambda engine: -engine.num_gpus)
        self._pool = ThreadPoolExecutor(max_workers=max(1, len(order)))
        self._outcomes: dict[str, Future[Outcome]] = {
            engine.name: self._pool.submit(_run, engine, models[engine.model], devices, directory) for engine in order
        }

    def outcome(self, engine: EngineSpec) -> Outcome:
        """Waits for it."""
        return self._outcomes[engine.name].result()

    def judge(self, case: Case) -> tuple[str | None, Comparison | None, Comparison | None]:
        """What is wrong with a case, None if nothing is, and the comparisons of ours and of the control."""
        plain, control, ours = (self.outcome(engine) for engine in case.engines)
        for engine, outcome in zip(case.engines, (plain, control, ours), strict=True):
            if outcome.error:
                return f"{engine.name} failed: {outcome.error}", None, None
        dtype = case.ours.dtype
        found = compare(plain.answers, ours.answers, dtype)
        of_control = compare(plain.answers, control.answers, dtype)
        return verdict(found, of_control, case.plain.num_roundings) or _untested(case, ours), found, of_control


def _untested(case: Case, ours: Outcome) -> str | None:
    """What the run should have met and has not."""
    if not ours.preemptions:
        return "no request was preempted"
    if not ours.prefix_hits:
        return "no prefix was found in the cache"
    if case.micro_batches != tuple(ours.micro_batches):
        seen = " and ".join(map(str, ours.micro_batches))
        return f"steps replayed graphs of {seen} micro-batches" if seen else "no step replayed a graph"
    return None


def _run(engine: EngineSpec, model: Path, devices: Devices, directory: Path) -> Outcome:
    result, log = directory / f"{engine.name}.json", directory / f"{engine.name}.log"
    result.unlink(missing_ok=True)
    with devices.lent(engine.num_gpus) as mine, log.open("w") as output:
        command = [sys.executable, "-m", "tests.gpu.engine", engine.as_argument(), str(model), str(result)]
        gpus = visible_devices()
        environment = {**_environment(directory), "CUDA_VISIBLE_DEVICES": ",".join(gpus[index] for index in mine)}
        try:
            subprocess.run(
                command, stdout=output, stderr=output, env=environment, timeout=START_AND_RUN_SECONDS, check=True
            )
        except subprocess.SubprocessError as error:
            return Outcome([], error=f"{error}\n{_tail(log)}")
    found = json.loads(result.read_text())
    answers = [
        Answer(answer["tokens"], [{int(token): logit for token, logit in best.items()} for best in answer["logits"]])
        for answer in found.pop("answers")
    ]
    return Outcome(answers, **found)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def _environment(directory: Path) -> dict[str, str]:
    """For an engine, also where this package is not installed: vLLM finds its plugins by entry points."""
    paths = [str(_ROOT)]
    if not any(e.name == "tknp" for e in importlib.metadata.entry_points(group="vllm.general_plugins")):
        stand_in = directory / "entry-points" / "tknp-0.dist-info"
        stand_in.mkdir(parents=True, exist_ok=True)
        (stand_in / "METADATA").write_text("Metadata-Version: 2.1\nName: tknp\nVersion: 0\n")
        plugin = "services.decode.token_parallel.plugin:register"
        (stand_in / "entry_points.txt").write_text(f"[vllm.general_plugins]\ntknp = {plugin}\n")
        paths.append(str(stand_in.parent))
    known = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, *([known] if known else [])]),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONUNBUFFERED": "1",
    }


def table(rows: Sequence[tuple[Case, str | None, Comparison | None, Comparison | None]]) -> str:
    """For people."""
    lines = [
        f"{'case':18} {'same':>7} {'compared':>11} {'most steps':>11} {'control':>8} {'rms':>6} {'control':>8}  verdict"
    ]
    for case, wrong, found, control in rows:
        if found is None or control is None:
            cells = " " * 56  # of what is below
        else:
            same = f"{found.num_answers - len(found.differences)}/{found.num_answers}"
            compared = f"{found.num_compared}/{found.num_tokens}"
            most = f"{found.most_steps:11.1f} {control.most_steps:8.1f}"
            cells = f"{same:>7} {compared:>11} {most} {found.rms_steps:6.2f} {control.rms_steps:8.2f}"
        lines.append(f"{case.ours.name:18} {cells}  {wrong or 'equal'}")
    return "\n".join(lines)
