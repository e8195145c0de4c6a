"""What root and KV workers share to replay decode steps as FULL CUDA graphs.

A graph is captured once for a number of rows; who owns which row is read from tables in device memory that each step
writes anew (exchange.StepTables, own_rows.OwnRows). Root and KV workers capture on their own and at any time, because
the exchange inside a graph needs no call of the other side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from services.decode.token_parallel.batch import Batch
from services.decode.token_parallel.exchange import Exchange, StepTables
from services.decode.token_parallel.micro_batch import MAX_MICRO_BATCHES, GraphSizes, MicroBatch, divide
from services.decode.token_parallel.overlap import Overlap
from services.decode.token_parallel.own_rows import OwnRows
from services.decode.token_parallel.rows import RowLayout


@dataclass(frozen=True)
class GraphStep:
    """A decode step that replays graphs.

    Attributes:
        size: rows of the root's graph.
        micro_batches: its rows; `size` divided by their number holds those of each.
    """

    size: int
    micro_batches: list[MicroBatch]

    @property
    def rows_each(self) -> int:
        """Rows of one micro-batch in the root's graph."""
        return self.size // len(self.micro_batches)


class CapturedMetadata:
    """Attention metadata of the layers of one KV cache group inside a graph: vLLM's own, per micro-batch."""

    def __init__(self, metadata: list[Any]) -> None:
        self.token_parallel_captured = metadata


class Graphs:
    """One rank's part in replaying graphs."""

    def __init__(self, exchange: Exchange, layer_names: Sequence[str]) -> None:
        """Args:
        layer_names: attention layers in the order in which all ranks run them.
        """
        self.exchange = exchange
        self.sizes = GraphSizes()
        """Its sizes are known once the root has captured its graphs."""
        self.overlap: Overlap | None = None
        """Chooses where there are graphs with one micro-batch and with two; one if it is None."""
        self.micro_batch = 0
        """The one whose layers are being captured."""
        self.first_sent = torch.cuda.Event() if torch.cuda.is_available() else None
        """On the root: the rows of the first layer and micro-batch are on their way."""
        self.step: GraphStep | None = None
        """The step that runs, if it replays graphs."""
        self._index = {name: i for i, name in enumerate(layer_names)}
        self.own_rows: list[OwnRows] = []

    def allocate(self, max_blocks: Sequence[int], device: torch.device) -> None:
        """Once the KV cache groups are known; see `OwnRows`."""
        self.own_rows = [OwnRows(self.exchange.max_rows, max_blocks, device) for _ in range(MAX_MICRO_BATCHES)]

    @contextmanager
    def capturing(self, micro_batch: int) -> Iterator[None]:
        """Marks the layers run inside as those of one micro-batch."""
        self.micro_batch = micro_batch
        yield
        self.micro_batch = 0

    def begin_step(self, batch: Batch) -> GraphStep | None:
        """Decides, alike on every rank, whether the scheduled step replays graphs, and how it is divided."""
        size = self.sizes.size_for(len(batch.num_scheduled_tokens)) if batch.is_decode() else None
        if size is None:
            self.step = None
        else:
            parts = self.sizes.num_micro_batches(size)
            if parts > 1 and self.sizes.has_whole:
                overlaps = self.overlap is not None and self.overlap.pays(size, batch.blocks_by_rank())
                parts = parts if overlaps else 1
            self.step = GraphStep(size, divide(batch.scheduled_by_rank(), parts))
            self.exchange.num_steps += 1
        return self.step

    def write_own_rows(self, batch: Batch, rows_each: int) -> list[int]:
        """Writes the own rows of the step's micro-batches; returns the longest sequence of each."""
        assert self.step is not None
        written = self.own_rows[: len(self.step.micro_batches)]
        for own, part in zip(written, self.step.micro_batches, strict=True):
            own.write(batch.decode_rows(part.requests[self.exchange.rank]), rows_each)
        return [own.longest for own in written]

    def write_inputs(self, batch: Batch, batch_row: dict[str, int]) -> list[int]:
        """On the root: writes all that the step's graph reads; returns the longest sequence of each micro-batch.

        Args:
            batch_row: the row of each request in the model runner's batch.
        """
        assert self.step is not None
        self.exchange.buffers.write(root_tables(self.step, self.exchange, self.layers_before, batch_row))
        return self.write_own_rows(batch, self.step.rows_each)

    @property
    def layers_before(self) -> int:
        """Layers counted before this step, which flags are compared with."""
        return self.exchange.num_steps * len(self._index)

    def exchange_and_attend(self, impl: Any, layer: Any, qkv: Any, metadata: Any, output: torch.Tensor) -> None:
        """The root's part of one layer, as it is captured: remote rows go out first, so that their owners work while
        the root attends to its own."""
        m, index = self.micro_batch, self._index[layer.layer_name]
        self.exchange.send(m, index, RowLayout.of(layer), qkv)
        if m == 0 and index == 0 and self.first_sent is not None:
            self.first_sent.record()
        impl.attend_rows(layer, *qkv, metadata.token_parallel_captured[m], output)
        self.exchange.wait(m, index)
        self.exchange.take(m, output)


def root_tables(step: GraphStep, exchange: Exchange, layers_before: int, batch_row: dict[str, int]) -> StepTables:
    """The root's tables for a step.

    Args:
        batch_row: the row of each request in the model runner's batch.
    """
    tables = exchange.buffers.idle()
    tables.step[:] = layers_before
    for m, part in enumerate(step.micro_batches):
        for rank, (first, requests) in enumerate(zip(part.first_rows, part.requests, strict=True)):
            rows = slice(first, first + len(requests))
            tables.order[m][rows] = [batch_row[request] for request in requests]
            if rank and requests:
                tables.target_rank[m][rows] = rank
                tables.target_row[m][rows] = np.arange(len(requests))
                tables.needed[m][rank] = layers_before
        tables.place[tables.order[m][: part.num_rows]] = m * step.rows_each + np.arange(part.num_rows)
    return tables


def worker_tables(step: GraphStep, exchange: Exchange, layers_before: int) -> StepTables:
    """A KV worker's tables for a step."""
    tables = exchange.buffers.idle()
    tables.step[:] = layers_before
    for m, part in enumerate(step.micro_batches):
        count = len(part.requests[exchange.rank])
        if count:
            tables.target_rank[m][:count] = 0
            tables.target_row[m][:count] = part.first_rows[exchange.rank] + np.arange(count)
            tables.needed[m][0] = layers_before
    return tables
