"""How the KV blocks of one token-parallel engine are divided among its ranks.

The scheduler speaks *global* block ids: rank r owns `[bases[r], bases[r] + num_blocks[r])` and the root's range
starts at 0. A rank's own cache is indexed from 0, so ids are rebased where a KV worker begins.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class BlockPartition:
    """The blocks of each token-parallel rank, rank 0 (the root) first.

    Attributes:
        num_blocks: of each rank.
        num_shards: workers of each rank, which divide the KV heads of its blocks among them.
    """

    num_blocks: tuple[int, ...]
    num_shards: int = 1

    @property
    def size(self) -> int:
        """Number of token-parallel ranks."""
        return len(self.num_blocks)

    @property
    def total(self) -> int:
        """Number of blocks of all ranks together."""
        return sum(self.num_blocks)

    @property
    def bases(self) -> tuple[int, ...]:
        """First global block id of each rank."""
        return (0, *accumulate(self.num_blocks[:-1]))

    def rank_of(self, block_id: int) -> int:
        """The rank that owns a global block id.

        Raises:
            ValueError: no rank owns it.
        """
        if not 0 <= block_id < self.total:
            raise ValueError(f"block {block_id} belongs to no rank: the {self.size} ranks hold {self.total} blocks")
        return bisect_right(self.bases, block_id) - 1

    def rank_of_all(self, block_ids: Iterable[int]) -> int | None:
        """The one rank that owns all of `block_ids`; None if there are none.

        Raises:
            ValueError: they belong to more than one rank, which would mean that a request was split.
        """
        ids = list(block_ids)
        if not ids:
            return None
        # A rank's ids have no gap, and prompts have thousands of blocks.
        first, last = self.rank_of(min(ids)), self.rank_of(max(ids))
        if first != last:
            raise ValueError(f"the blocks of one request lie on ranks {first} to {last}; a request lives on one rank")
        return first


@dataclass(frozen=True)
class RankPlace:
    """Where a worker process stands in its engine's partition.

    Attributes:
        rank: token-parallel rank.
        shard: which part of the rank's KV heads it has, 0 to `partition.num_shards` - 1.
    """

    rank: int
    partition: BlockPartition
    shard: int = 0

    @property
    def base(self) -> int:
        """First global block id of this rank."""
        return self.partition.bases[self.rank]

    @property
    def num_blocks(self) -> int:
        """Number of blocks of this rank."""
        return self.partition.num_blocks[self.rank]


# vLLM builds schedulers, connectors and workers itself, from their class names, and hands them nothing of ours; so,
# like its own process groups (vllm.distributed.parallel_state), the partition of the engine that this process belongs
# to is kept here. One process serves one engine: the engine core sets the partition, each worker its place.
_partition: BlockPartition | None = None
_place: RankPlace | None = None


def set_partition(partition: BlockPartition | None) -> None:
    """Called by the executor once the ranks' memory is known, before the scheduler and its connector are made."""
    global _partition
    _partition = partition


def get_partition() -> BlockPartition | None:
    """The partition of this process's engine; None where the engine is not token-parallel."""
    return _partition


def set_place(place: RankPlace | None) -> None:
    """Called by a worker when it learns its share of the blocks."""
    global _place
    _place = place


def get_place() -> RankPlace | None:
    """This worker's place; None where the engine is not token-parallel."""
    return _place
