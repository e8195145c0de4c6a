"""How long a rank's part of a decode step takes, measured once at start, so that all ranks can finish together."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

from services.decode.token_parallel.either_graph import EitherGraph
from services.decode.token_parallel.micro_batch import GraphSizes
from services.decode.token_parallel.overlap import RootPace

_WARM_UP, _REPEATS = 2, 5
_MAX_SIZES = 6
"""Of the graphs of a root, the ones that are measured."""


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


def root_pace(sizes: GraphSizes, captured: Mapping[Any, Any], num_layers: int) -> RootPace | None:
    """Of a root to which no row belongs yet; None if its steps never overlap.

    Args:
        captured: its graphs, by vLLM's descriptor.
    """
    halves = {d.num_tokens: graph for d, graph in captured.items() if sizes.num_micro_batches(d.num_tokens) > 1}
    if not halves:
        return None
    every = sorted(halves)
    rows = sorted({every[i * (len(every) - 1) // max(1, _MAX_SIZES - 1)] for i in range(_MAX_SIZES)})
    graphs = [halves[size] for size in rows]
    either = [graph for graph in graphs if isinstance(graph, EitherGraph)]
    halved = [seconds_of(graph.halved.replay if isinstance(graph, EitherGraph) else graph.replay) for graph in graphs]
    whole = [seconds_of(graph.whole.replay) for graph in either]
    return RootPace(num_layers, tuple(rows), tuple(halved), tuple(whole))
