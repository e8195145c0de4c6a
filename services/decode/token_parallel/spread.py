"""Attention where every rank runs the model (`--token-parallel-weights spread`): the query heads of a row go to the
rank that has its KV cache, and the outputs come back.

The workers of a group have the same KV heads, so each computes the keys and values of all rows by itself and keeps
those of its own requests. Of the query heads that attend to them each has its part: a row's owner gathers the parts,
attends with all of them, and deals the outputs out again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from services.decode.token_parallel.batch import Batch
from services.decode.token_parallel.context import TokenParallelContext
from services.decode.token_parallel.exchange import Exchange, StepTables
from services.decode.token_parallel.graphs import Graphs
from services.decode.token_parallel.own_rows import DecodeRows, OwnRows
from services.decode.token_parallel.step import RootStep

QUERIES, OUTPUTS = 0, 1
"""The two regions of an exchange, which otherwise are the two micro-batches'."""


def attend_layer(
    impl: Any,
    context: TokenParallelContext,
    step: RootStep,
    layer: Any,
    qkv: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    metadata: Any,
    output: torch.Tensor,
) -> None:
    """One layer of a step that replays no FULL CUDA graph; all workers of a group are in it at the same time.

    Args:
        qkv, output: of all rows of the batch; `[num_rows, num_heads, head_size]` with this worker's part of the query
            heads.
    """
    step.enter_layer(layer.layer_name)
    query, key, value = qkv
    own = step.rows[context.rank]
    others = [(rank, rows) for rank, rows in enumerate(step.rows) if rank != context.rank]

    parts = query.new_empty(context.size, len(own), *query.shape[1:])
    parts[context.rank] = query.index_select(0, own)
    _exchange(
        context,
        sends=[(query.index_select(0, rows), rank) for rank, rows in others],
        recvs=[(parts[rank], rank) for rank, _ in others],
    )
    attended = output.new_empty(len(own), context.size * output.shape[1], output.shape[2])
    if len(own):
        own_key, own_value = (None if t is None else t.index_select(0, own) for t in (key, value))
        impl.attend_rows(layer, parts.transpose(0, 1).flatten(1, 2), own_key, own_value, metadata, attended)
    dealt = attended.unflatten(1, (context.size, output.shape[1])).transpose(0, 1).contiguous()
    arriving = [(output.new_empty(len(rows), *output.shape[1:]), rank) for rank, rows in others]
    _exchange(context, sends=[(dealt[rank], rank) for rank, _ in others], recvs=arriving)
    output.index_copy_(0, own, dealt[context.rank])
    for (_, rows), (outputs, _) in zip(others, arriving, strict=True):
        output.index_copy_(0, rows, outputs)


def attend_alone(
    impl: Any,
    layer: Any,
    qkv: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    metadata: Any,
    output: torch.Tensor,
) -> None:
    """A warm-up, which concerns no other worker: their query heads are taken to be like this one's."""
    query, key, value = qkv
    num_heads = query.shape[1]
    attended = output.new_empty(output.shape[0], impl.num_heads, output.shape[2])
    impl.attend_rows(layer, query.repeat(1, impl.num_heads // num_heads, 1), key, value, metadata, attended)
    output.copy_(attended[:, :num_heads])


def _exchange(
    context: TokenParallelContext, sends: list[tuple[torch.Tensor, int]], recvs: list[tuple[torch.Tensor, int]]
) -> None:
    with context.clock.waiting():
        context.transport.wait(
            context.transport.start(
                sends=[(rows, rank) for rows, rank in sends if len(rows)],
                recvs=[(rows, rank) for rows, rank in recvs if len(rows)],
            )
        )


class SpreadGraphs(Graphs):
    """One rank's part in replaying graphs. A row of the exchange is one worker's query heads of a row of the batch."""

    def allocate(self, max_blocks: Any, device: torch.device) -> None:
        self.own_rows = [OwnRows(self.exchange.max_rows // self.exchange.size, max_blocks, device)]

    def write_inputs(self, batch: Batch, batch_row: dict[str, int]) -> list[int]:
        assert self.step is not None
        (micro_batch,) = self.step.micro_batches
        exchange = self.exchange
        exchange.buffers.write(spread_tables(micro_batch.requests, exchange, self.layers_before, batch_row))
        rows = batch.decode_rows(own := micro_batch.requests[exchange.rank])
        slots = [np.full(self.step.size, -1, np.int64) for _ in rows.slots]
        for of_batch, of_own in zip(slots, rows.slots, strict=True):
            of_batch[[batch_row[request] for request in own]] = of_own
        self.own_rows[0].write(DecodeRows(rows.seq_lens, rows.block_tables, slots), self.step.size)
        return [self.own_rows[0].longest]

    def exchange_and_attend(self, impl: Any, layer: Any, qkv: Any, metadata: Any, output: torch.Tensor) -> None:
        """One layer, as it is captured."""
        index = self._index[layer.layer_name]
        (captured,) = metadata.token_parallel_captured
        self.send_queries(index, qkv[0])
        impl.write_cache(layer, *qkv[1:], captured)  # while they are on their way
        self.attend_own(index, impl, layer, qkv, captured, output)
        self.take_outputs(index, output)

    def send_queries(self, index: int, query: torch.Tensor) -> None:
        """Each row of `[num_rows, num_heads, head_size]` to its owner."""
        self._put(QUERIES, index, query)

    def attend_own(self, index: int, impl: Any, layer: Any, qkv: Any, metadata: Any, like: torch.Tensor) -> None:
        """With all query heads to this rank's own rows; each worker gets the outputs of its own heads."""
        query, key, value = qkv
        num_rows, num_heads, head_size = query.shape
        self.exchange.wait(QUERIES, index)
        gathered = self._received(QUERIES, num_rows * self.exchange.size, num_heads * head_size)
        attended = like.new_empty(num_rows, self.exchange.size * num_heads, like.shape[2])
        impl.attend(layer, gathered.view(num_rows, -1, head_size), key, value, metadata, attended)
        self._put(OUTPUTS, index, attended.view(num_rows * self.exchange.size, num_heads, like.shape[2]))

    def take_outputs(self, index: int, output: torch.Tensor) -> None:
        """Of all rows, in the batch's order."""
        self.exchange.wait(OUTPUTS, index)
        output.copy_(self._received(OUTPUTS, len(output), output[0].numel()).view(output.shape))

    # Rows lie without a gap, so that the heads of a row's workers are one tensor.

    def _put(self, region: int, index: int, rows: torch.Tensor) -> None:
        width = rows[0].numel()
        self.exchange.put(region, index, (rows, None, None), (width,), row_width=width)

    def _received(self, region: int, num_rows: int, width: int) -> torch.Tensor:
        return self.exchange.received(region, num_rows, width, row_width=width)


def spread_tables(
    requests: tuple[tuple[str, ...], ...], exchange: Exchange, layers_before: int, batch_row: dict[str, int]
) -> StepTables:
    """A rank's tables for a decode step.

    Args:
        requests: of each rank.
        batch_row: the row of each request in the model runner's batch.
    """
    tables = exchange.buffers.idle()
    tables.step[:] = layers_before
    for region in (QUERIES, OUTPUTS):
        tables.needed[region][:] = layers_before
    for rank, of_rank in enumerate(requests):
        rows = [batch_row[request] for request in of_rank]
        tables.target_rank[QUERIES][rows] = rank
        tables.target_row[QUERIES][rows] = np.arange(len(rows)) * exchange.size + exchange.rank
    own = np.array([batch_row[request] for request in requests[exchange.rank]], np.int64)
    everybody = np.arange(exchange.size)
    tables.target_rank[OUTPUTS][: len(own) * exchange.size] = np.tile(everybody, len(own))
    tables.target_row[OUTPUTS][: len(own) * exchange.size] = np.repeat(own, exchange.size)
    return tables
