"""A CUDA graph for each way of dividing a decode step, where vLLM's runner keeps one for a number of rows."""

from __future__ import annotations

from typing import Any

from services.decode.token_parallel.graphs import Graphs
from services.decode.token_parallel.micro_batch import GraphSizes


class EitherGraph:
    """Replays the graph of the step that runs."""

    def __init__(self, whole: Any, halved: Any, graphs: Graphs) -> None:
        """Args:
        whole, halved: captured with one micro-batch, and with two.
        """
        self.whole, self.halved = whole, halved
        self._graphs = graphs

    def replay(self) -> None:
        """Called by vLLM as a CUDA graph's (v1/worker/gpu/cudagraph_utils.py, run_fullgraph)."""
        step = self._graphs.step
        (self.halved if step is not None and len(step.micro_batches) > 1 else self.whole).replay()


def capture_halves(runner: Any, graphs: Graphs, overlap_from: int) -> None:
    """Captures all graphs once more, now with two micro-batches from so many rows on, and keeps both.

    Args:
        runner: vLLM's model runner, which has captured them with one.
    """
    manager = runner.cudagraph_manager
    whole = dict(manager.graphs)
    manager.release_graphs()
    graphs.sizes = GraphSizes(overlap_from=overlap_from, has_whole=True)
    runner.capture_model()
    for descriptor, halved in manager.graphs.items():
        if graphs.sizes.num_micro_batches(descriptor.num_tokens) > 1:
            manager.graphs[descriptor] = EitherGraph(whole[descriptor], halved, graphs)
        else:
            manager.graphs[descriptor] = whole[descriptor]
