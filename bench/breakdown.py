"""Where the time of a decode step goes on each rank, from the Chrome traces of torch's profiler."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_KINDS = (
    ("wait", ("wait_for_flags",)),
    ("send", ("put_rows", "ncclDevKernel")),
    ("take", ("take_rows",)),
    ("kv write", ("reshape_and_cache",)),
    ("attention", ("flash", "prepare_varlen", "attention", "paged")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "xmma", "splitKreduce", "cublas")),
)
"""Kernel names hold one of these, in the order in which they are looked for; the rest is `other`."""


@dataclass(frozen=True)
class RankTime:
    """One rank's GPU over some steps; milliseconds of one step.

    Attributes:
        kinds: by kind of kernel; micro-batches overlap, so that these may add up to more than `step`.
        busy: in which any kernel but a waiting one ran.
    """

    rank: int
    num_steps: int
    step: float
    kinds: dict[str, float]
    busy: float

    @property
    def idle(self) -> float:
        """Milliseconds of a step in which the GPU computed nothing: it waited for others, or for its host."""
        return self.step - self.busy


def read(trace: Path, rank: int, num_layers: int, num_micro_batches: int) -> RankTime:
    """The time of one rank.

    Raises:
        ValueError: the trace holds no whole step.
    """
    opened = gzip.open if trace.suffix == ".gz" else open
    with opened(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    kernels = sorted((e for e in events if e.get("cat") == "kernel"), key=lambda e: float(e["ts"]))
    # Each layer of each micro-batch writes the KV cache once; steps are alike, so it does not matter where one begins.
    written = [float(e["ts"]) for e in kernels if kind_of(e["name"]) == "kv write"]
    writes = num_layers * num_micro_batches
    num_steps = len(written) // writes
    if num_steps < 2:
        raise ValueError(f"{trace} holds no whole decode step of {num_layers} layers")
    first, last = written[0], written[(num_steps - 1) * writes]
    inside = [e for e in kernels if first <= float(e["ts"]) < last]
    kinds: dict[str, float] = defaultdict(float)
    for event in inside:
        kinds[kind_of(event["name"])] += float(event["dur"])
    steps = num_steps - 1
    busy = _union((float(e["ts"]), float(e["dur"])) for e in inside if kind_of(e["name"]) != "wait")
    return RankTime(
        rank=rank,
        num_steps=steps,
        step=(last - first) / steps / 1e3,
        kinds={kind: total / steps / 1e3 for kind, total in kinds.items()},
        busy=busy / steps / 1e3,
    )


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    lower = kernel.lower()
    return next((kind for kind, names in _KINDS if any(name.lower() in lower for name in names)), "other")


def _union(spans: Iterable[tuple[float, float]]) -> float:
    """Length of what the (start, duration) spans, in order of their start, cover together."""
    total, end = 0.0, float("-inf")
    for start, duration in spans:
        total += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    return total


def efficiency(ranks: Sequence[RankTime]) -> float:
    """token_parallel_efficiency of these steps: the share of the ranks' time in which they computed, 0 to 1."""
    return sum(rank.busy for rank in ranks) / sum(rank.step for rank in ranks)


def table(ranks: Sequence[RankTime]) -> str:
    """For people; milliseconds of one step."""
    kinds = [kind for kind, _ in _KINDS if any(kind in rank.kinds for rank in ranks)] + ["other"]
    lines = ["rank   step " + "".join(f"{kind:>17}" for kind in kinds) + "     idle"]
    for rank in ranks:
        cells = "".join(f"{rank.kinds.get(kind, 0.0):17.2f}" for kind in kinds)
        lines.append(f"{rank.rank:4} {rank.step:6.2f} {cells} {rank.idle:8.2f}")
    return "\n".join([*lines, f"token_parallel_efficiency {efficiency(ranks):.2f}"])


def as_json(ranks: Sequence[RankTime]) -> dict[str, Any]:
    """For the record."""
    rows = [
        {"rank": r.rank, "ms_per_step": r.step, "idle_ms": r.idle, "num_steps": r.num_steps, "kinds_ms": r.kinds}
        for r in ranks
    ]
    return {"token_parallel_efficiency": round(efficiency(ranks), 3), "ranks": rows}
