"""Run by test_exchange.py: three ranks exchange the rows of some steps over host memory."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import random

import torch

from services.decode.token_parallel.exchange import Exchange
from services.decode.token_parallel.graphs import Graphs, GraphStep, root_tables, worker_tables
from services.decode.token_parallel.micro_batch import MicroBatch, divide
from services.decode.token_parallel.rows import RowLayout
from services.decode.token_parallel.spread import SpreadGraphs, spread_tables

SIZE, MAX_ROWS, STEP_ROWS, LAYERS = 3, 8, 8, ("first", "second")
LAYOUT = RowLayout(num_heads=4, num_kv_heads=2, head_size=32, head_size_v=32, shares_cache=False)
WIDTH = sum(LAYOUT.widths)
HEADS_WIDTH = 2 * 64  # of each worker's part of the query heads


class HostMemory:
    def __init__(self, num_bytes: int) -> None:
        self.own = torch.zeros(num_bytes, dtype=torch.uint8)
        self.addresses: list[int] = []


def attend(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Stands for attention: any function of a row alone."""
    return query * 2 + key.repeat_interleave(2, dim=1)


def make_ranks() -> list[Graphs]:
    memories = [HostMemory(Exchange.num_bytes(SIZE, MAX_ROWS, WIDTH, torch.float32)) for _ in range(SIZE)]
    for memory in memories:
        memory.addresses = [other.own.data_ptr() for other in memories]
    exchanges = [Exchange(memories[rank], rank, SIZE, MAX_ROWS, WIDTH, torch.float32) for rank in range(SIZE)]
    return [Graphs(exchange, LAYERS) for exchange in exchanges]


def run_micro_batch(ranks: list[Graphs], m: int, layer: int, rows: torch.Tensor, part: MicroBatch) -> torch.Tensor:
    root = ranks[0].exchange
    query, key, value = LAYOUT.views(rows)
    root.send(m, layer, LAYOUT, (query, key, value))
    output = torch.full_like(query, torch.nan)
    own = len(part.requests[0])
    output[:own] = attend(query, key)[:own]
    for worker in ranks[1:]:
        exchange = worker.exchange
        if part.requests[exchange.rank]:
            exchange.wait(m, layer)
            received = LAYOUT.views(exchange.received(m, len(rows), WIDTH))
            exchange.answer(m, layer, attend(received[0], received[1]))
    root.wait(m, layer)
    root.take(m, output)
    return output


def run_step(ranks: list[Graphs], owners: list[list[str]], parts: int) -> None:
    step = GraphStep(STEP_ROWS, divide(owners, parts))
    requests = [request for rank in owners for request in rank]
    random.Random(len(requests)).shuffle(requests)
    batch_row = {request: row for row, request in enumerate(requests)}
    for graphs in ranks:
        graphs.exchange.num_steps += 1
    root = ranks[0].exchange
    root.buffers.write(root_tables(step, root, ranks[0].layers_before, batch_row))
    for worker in ranks[1:]:
        worker.exchange.buffers.write(worker_tables(step, worker.exchange, worker.layers_before))
    batch = torch.randn(STEP_ROWS, WIDTH)
    for layer in range(len(LAYERS)):
        outputs = [
            run_micro_batch(ranks, m, layer, batch.index_select(0, root.tables.order[m][: step.rows_each]), part)
            for m, part in enumerate(step.micro_batches)
        ]
    query, key, _ = LAYOUT.views(batch)
    assert key is not None
    found = torch.cat(outputs).index_select(0, root.tables.place[:STEP_ROWS])
    assert torch.equal(found[: len(requests)], attend(query, key)[: len(requests)])


class Heads:
    """Stands for attention over all workers' query heads."""

    def attend(
        self, layer: None, query: torch.Tensor, key: None, value: None, num_own: int, output: torch.Tensor
    ) -> None:
        output[:num_own] = query[:num_own, :, : output.shape[2]] * 2
        output[num_own:] = torch.nan


def make_spread_ranks() -> list[SpreadGraphs]:
    size = Exchange.num_bytes(SIZE, MAX_ROWS * SIZE, HEADS_WIDTH, torch.float32)
    memories = [HostMemory(size) for _ in range(SIZE)]
    for memory in memories:
        memory.addresses = [other.own.data_ptr() for other in memories]
    rows = (MAX_ROWS * SIZE, HEADS_WIDTH, torch.float32)
    return [SpreadGraphs(Exchange(memories[r], r, SIZE, *rows, peers=(0, SIZE)), LAYERS) for r in range(SIZE)]


def run_spread_step(ranks: list[SpreadGraphs], owners: list[list[str]]) -> None:
    requests = [request for rank in owners for request in rank]
    random.Random(len(requests)).shuffle(requests)
    batch_row = {request: row for row, request in enumerate(requests)}
    of_rank = tuple(map(tuple, owners))
    for graphs in ranks:
        graphs.exchange.num_steps += 1
        tables = spread_tables(of_rank, graphs.exchange, graphs.layers_before, batch_row)
        graphs.exchange.buffers.write(tables)
    for layer in range(len(LAYERS)):
        queries = [torch.randn(STEP_ROWS, 2, 64) for _ in ranks]
        outputs = [torch.full((STEP_ROWS, 2, 32), torch.nan) for _ in ranks]
        for graphs, query in zip(ranks, queries, strict=True):
            graphs.send_queries(layer, query)
        for graphs, query, output, own in zip(ranks, queries, outputs, owners, strict=True):
            graphs.attend_own(layer, Heads(), None, (query, None, None), len(own), output)
        for graphs, query, output in zip(ranks, queries, outputs, strict=True):
            graphs.take_outputs(layer, output)
            assert torch.equal(output[: len(requests)], query[: len(requests), :, :32] * 2)


def main() -> None:
    spread = make_spread_ranks()
    run_spread_step(spread, [["a", "b"], ["c", "d", "e"], ["f"]])
    run_spread_step(spread, [[], ["c", "d", "e", "g", "h"], ["f"]])
    run_spread_step(spread, [list("abcdefgh"), [], []])
    ranks = make_ranks()
    run_step(ranks, [["a", "b"], ["c", "d", "e"], ["f"]], parts=2)
    run_step(ranks, [[], ["c", "d", "e", "g", "h"], ["f"]], parts=1)
    run_step(ranks, [["a"], [], ["f", "i"]], parts=2)  # rank 1 takes no part
    print(f"3 + 3 steps of {len(LAYERS)} layers")


if __name__ == "__main__":
    main()
