"""The root's model inside a FULL CUDA graph: rows by owner, in one micro-batch or in two that overlap."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from vllm.forward_context import get_forward_context

from services.decode.token_parallel.all_reduce import AllReduceOfEach
from services.decode.token_parallel.graphs import CapturedMetadata, Graphs


class GraphModel(nn.Module):
    """Wraps the model of vLLM's runner, as vLLM's own wrappers for CUDA graphs and micro-batches do.

    While a FULL graph is captured, the batch's rows are put in the order of their owners, and each micro-batch runs on
    a stream of its own: the root's device then has something to do while the rows of the other are away.
    """

    def __init__(self, model: nn.Module, graphs: Graphs, all_reduces: AllReduceOfEach | None = None) -> None:
        """Args:
        all_reduces: of a tensor-parallel root whose graphs may hold two micro-batches.
        """
        super().__init__()
        self.model = model
        self._graphs = graphs
        self._all_reduces = all_reduces
        self._side_stream = torch.cuda.Stream()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, *args: Any, **inputs: Any) -> Any:
        metadata = get_forward_context().attn_metadata
        captured = next(iter(metadata.values()), None) if isinstance(metadata, dict) else None
        if not isinstance(captured, CapturedMetadata):
            return self.model(*args, **inputs)
        size = inputs["positions"].shape[-1]
        tables = self._graphs.exchange.tables
        num_micro_batches = len(captured.token_parallel_captured)
        main = torch.cuda.current_stream()
        outputs = []
        for m in range(num_micro_batches):
            stream = self._side_stream if m else main
            if m:
                # KV workers take the first micro-batch's rows first, so those must not queue behind the second's.
                stream.wait_event(self._graphs.first_sent)
            reducing = nullcontext() if self._all_reduces is None else self._all_reduces.of(m)
            with torch.cuda.stream(stream), self._graphs.capturing(m), reducing:
                outputs.append(self.model(*args, **_rows(inputs, tables.order[m][: size // num_micro_batches])))
        if num_micro_batches > 1:
            main.wait_stream(self._side_stream)
        return torch.cat(outputs).index_select(0, tables.place[:size])


def _rows(inputs: dict[str, Any], order: torch.Tensor) -> dict[str, Any]:
    """The model's per-token inputs for the batch rows of `order`."""
    return {
        name: value.index_select(-1 if name == "positions" else 0, order) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }
