"""The CUDA graphs of a KV worker: all layers of a decode step, for a number of rows."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.platforms import current_platform

from services.decode.token_parallel.batch import Batch
from services.decode.token_parallel.graphs import Graphs, GraphStep, worker_tables
from services.decode.token_parallel.pace import seconds_of
from services.decode.token_parallel.rows import RowLayout


class KVGraphs:
    """Captures and replays: per layer and micro-batch wait for rows, write the cache, attend, send the outputs."""

    def __init__(
        self,
        graphs: Graphs,
        layers: Mapping[str, Any],
        attn_groups: Sequence[Sequence[Any]],
        max_model_len: int,
        dtype: torch.dtype,
    ) -> None:
        """Args:
        layers: vLLM's attention layers, in the order in which all ranks run them.
        attn_groups: vLLM's attention groups of each KV cache group.
        """
        self._graphs, self._layers, self._groups = graphs, layers, attn_groups
        self._max_model_len, self._dtype = max_model_len, dtype
        self._captured: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._sizes: dict[int, list[int]] = {}

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def capture(self) -> None:
        """Captures every graph that a step may need, largest first, so that the smaller ones find its memory."""
        pool = current_platform.get_global_graph_pool()
        for rows, parts in sorted(self._graphs.sizes.worker_shapes(), reverse=True):
            metadata = self._build(rows, [self._max_model_len] * parts)
            self._run(rows, metadata)  # compiles the kernels
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._run(rows, metadata)
            self._captured[rows, parts] = graph
            self._sizes.setdefault(parts, []).insert(0, rows)

    def replay(self, batch: Batch, step: GraphStep) -> None:
        """Enqueues this rank's part of a step."""
        exchange, parts = self._graphs.exchange, len(step.micro_batches)
        largest = max(len(part.requests[exchange.rank]) for part in step.micro_batches)
        rows = self._sizes[parts][bisect_left(self._sizes[parts], largest)]
        exchange.buffers.write(worker_tables(step, exchange, self._graphs.layers_before))
        self._build(rows, self._graphs.write_own_rows(batch, rows))
        self._captured[rows, parts].replay()

    def pace(self, batch: Batch) -> float | None:
        """Seconds of attention for each KV block, measured on as many rows as the largest graph holds."""
        if not self._captured:
            return None
        rows, parts = max(self._captured, key=lambda shape: shape[0] * shape[1])
        empty = seconds_of(self._captured[rows, parts].replay)
        blocks_each = min(batch.max_blocks[0] - 1, (batch.place.num_blocks - 1) // (rows * parts))
        if blocks_each < 1:
            return None
        for m in range(parts):
            self._graphs.own_rows[m].write(batch.any_rows(rows, blocks_each, first=m * rows), rows)
        self._build(rows, [own.longest for own in self._graphs.own_rows[:parts]])
        full = seconds_of(self._captured[rows, parts].replay)
        return max(0.0, full - empty) / (rows * parts * blocks_each)

    def _build(self, rows: int, longest: Sequence[int]) -> list[dict[str, Any]]:
        """Per micro-batch, each layer's metadata; what backends keep in buffers of their own is written anew."""
        return [
            {
                name: built
                for index, groups in enumerate(self._groups)
                for group in groups
                for built in (
                    group.get_metadata_builder(0).build_captured(
                        m, self._graphs.own_rows[m].metadata(index, rows, max_seq_len)
                    ),
                )
                for name in group.layer_names
            }
            for m, max_seq_len in enumerate(longest)
        ]

    def _run(self, rows: int, metadata: Sequence[dict[str, Any]]) -> None:
        exchange = self._graphs.exchange
        for index, (name, layer) in enumerate(self._layers.items()):
            layout = RowLayout.of(layer)
            for m, of_layer in enumerate(metadata):
                exchange.wait(m, index)
                packed = exchange.received(m, rows, sum(layout.widths))
                output = torch.empty(
                    rows, layout.num_heads, layout.head_size_v, dtype=self._dtype, device=packed.device
                )
                layer.impl.attend_rows(layer, *layout.views(packed), of_layer[name], output)
                exchange.answer(m, index, output)
