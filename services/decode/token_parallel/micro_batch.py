"""How a decode step is divided for replaying CUDA graphs: pure functions, which every rank computes alike."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

MAX_MICRO_BATCHES = 2
"""While the root computes the matrix products of one, the KV workers attend to the rows of the other."""


@dataclass(frozen=True)
class MicroBatch:
    """Requests whose rows go through the layers together, one row each; rows are laid out by owner.

    Attributes:
        requests: of each token-parallel rank, in row order.
    """

    requests: tuple[tuple[str, ...], ...]

    @property
    def num_rows(self) -> int:
        """Rows of all ranks."""
        return sum(map(len, self.requests))

    @property
    def first_rows(self) -> tuple[int, ...]:
        """Where each rank's rows begin."""
        return (0, *accumulate(len(requests) for requests in self.requests[:-1]))


def divide(requests_by_rank: Sequence[Sequence[str]], num_micro_batches: int) -> list[MicroBatch]:
    """Halves every rank's rows, or leaves them as they are; the halves differ by one row at most."""
    if num_micro_batches == 1:
        return [MicroBatch(tuple(map(tuple, requests_by_rank)))]
    first: list[tuple[str, ...]] = []
    second: list[tuple[str, ...]] = []
    lead = 0  # rows that the first half has more
    for requests in requests_by_rank:
        middle = (len(requests) + (lead <= 0)) // 2
        first.append(tuple(requests[:middle]))
        second.append(tuple(requests[middle:]))
        lead += 2 * middle - len(requests)
    return [MicroBatch(tuple(first)), MicroBatch(tuple(second))]


@dataclass(frozen=True)
class GraphSizes:
    """Which decode steps replay a FULL CUDA graph on the root.

    Attributes:
        sizes: rows of the captured graphs, ascending; empty where there are none.
        overlap_from: rows from which a graph can hold two micro-batches; None if none can.
        has_whole: whether there are graphs with one, too, of as many rows.
    """

    sizes: tuple[int, ...] = ()
    overlap_from: int | None = None
    has_whole: bool = False

    def size_for(self, num_rows: int) -> int | None:
        """Rows of the smallest graph that holds `num_rows`, as vLLM's dispatcher chooses it; None if none does."""
        index = bisect_left(self.sizes, num_rows)
        return self.sizes[index] if num_rows > 0 and index < len(self.sizes) else None

    def num_micro_batches(self, size: int) -> int:
        """The most micro-batches in a graph of `size` rows."""
        return 2 if self.overlap_from is not None and size >= self.overlap_from and size % 2 == 0 else 1

    def worker_shapes(self) -> list[tuple[int, int]]:
        """(rows a micro-batch, micro-batches) of the graphs that a KV worker needs: any share of a step may be its
        own."""
        limits = dict.fromkeys(range(1, MAX_MICRO_BATCHES + 1), 0)
        for size in self.sizes:
            parts = self.num_micro_batches(size)
            for held in {parts, 1} if self.has_whole else {parts}:
                limits[held] = max(limits[held], size // held)
        return [(rows, parts) for parts, limit in limits.items() for rows in _steps_up_to(limit)]


def _steps_up_to(limit: int) -> list[int]:
    """As fine as vLLM's own sizes of CUDA graphs."""
    steps = [1, 2, 4, *range(8, 256, 8), *range(256, limit, 16)]
    return [step for step in steps if step < limit] + [limit] * (limit > 0)


def overlap_threshold(weight_bytes: int, kv_bytes_per_token: int, max_model_len: int, num_ranks: int) -> int:
    """Rows from which two micro-batches can pay.

    Each micro-batch reads the root's weights once more, so it pays where a rank's attention takes longer than that:
    where its share of the KV cache has more bytes than the weights. Here requests are as long as they may be; whether
    it pays with those that there are is seen at each step (overlap.py).

    Args:
        kv_bytes_per_token: of all layers of one root.
    """
    return max(2, -(-weight_bytes * num_ranks // (kv_bytes_per_token * max_model_len)))
