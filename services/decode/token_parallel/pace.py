"""How long a rank's part of a decode step takes, measured once at start, so that placement can make all ranks finish
together."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

_WARM_UP, _REPEATS = 2, 5


def seconds_of(replay: Callable[[], None]) -> float:
    """Median device seconds of what `replay` enqueues on the current stream."""
    measured = []
    for run in range(_WARM_UP + _REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        if run >= _WARM_UP:
            measured.append(float(begin.elapsed_time(end)) / 1e3)
    return float(statistics.median(measured))


def root_work_in_blocks(dense_seconds: float, seconds_per_block: Sequence[float]) -> int:
    """Blocks that a KV worker attends to while the root does everything but attend.

    Args:
        dense_seconds: of the root's graph when nobody owns a row.
        seconds_per_block: of each KV worker's attention, of all layers.
    """
    pace = statistics.fmean(seconds_per_block)
    return round(dense_seconds / pace) if pace > 0 else 0
