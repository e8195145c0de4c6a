"""A CUDA graph for each way of dividing a decode step, where vLLM's runner keeps one for a number of rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def capturing_both(runner: Any, graphs: Graphs, overlap_from: int) -> Iterator[None]:
    """While it lasts, vLLM's model runner captures graphs with one micro-batch, and once more with two from so many
    rows on, and keeps both. What its `capture_model` returns are the bytes of both.

    A patch of this one runner: behind vLLM's own capture it would be too late, since vLLM then freezes the heap, which
    a capture unfreezes, and begins to watch for kernels that are compiled late (v1/worker/gpu_worker.py,
    compile_or_warm_up_model).
    """
    capture = runner.capture_model

    def capture_both(**options: Any) -> int:
        manager = runner.cudagraph_manager
        graphs.sizes = GraphSizes()
        num_bytes = capture(**options)
        whole = dict(manager.graphs)
        manager.release_graphs()
        graphs.sizes = GraphSizes(overlap_from=overlap_from, has_whole=True)
        num_bytes += capture(**options)
        for descriptor, halved in manager.graphs.items():
            is_either = graphs.sizes.num_micro_batches(descriptor.num_tokens) > 1
            one = whole[descriptor]
            manager.graphs[descriptor] = EitherGraph(one, halved, graphs) if is_either else one
        return int(num_bytes)

    runner.capture_model = capture_both
    try:
        yield
    finally:
        runner.capture_model = capture
