"""One KV cache manager per token-parallel rank behind the interface of vLLM's single one.

Every request lives on one rank and all its blocks come from that rank's pool. Block ids are global
(tknp.common.partition).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.request import Request, RequestStatus

from services.decode.token_parallel.overlap import get_overlap
from services.decode.token_parallel.placement import RankState, choose_rank
from tknp.common.partition import BlockPartition


class _CoordinatorView:
    """The part of vLLM's KVCacheCoordinator that the scheduler and the engine core use."""

    def __init__(self, manager: PartitionedKVCacheManager) -> None:
        self._manager = manager

    def get_num_blocks_to_allocate(self, request_id: str, **kwargs: Any) -> int:
        manager = self._manager.manager_of(request_id)
        return int(manager.coordinator.get_num_blocks_to_allocate(request_id=request_id, **kwargs))

    def __getattr__(self, name: str) -> Any:
        # Block sizes and flags, which are the same on all ranks.
        return getattr(self._manager.managers[0].coordinator, name)


class PartitionedKVCacheManager:
    """Routes each call to the manager of the rank that the request lives on, and adds up what concerns all."""

    def __init__(
        self,
        make: Callable[[Any], KVCacheManager],
        kv_cache_config: Any,
        partition: BlockPartition,
        max_model_len: int,
        max_blocks: Sequence[int],
    ) -> None:
        """Args:
        make: builds vLLM's manager for one rank's KVCacheConfig.
        kv_cache_config: the engine's, whose groups all ranks share.
        max_blocks: per KV cache group, blocks that a request of `max_model_len` holds at most at one time; less than
            its tokens fill where a sliding window lets some go.
        """
        self.partition = partition
        self.managers: list[KVCacheManager] = []
        for base, num_blocks in zip(partition.bases, partition.num_blocks, strict=True):
            config = copy.copy(kv_cache_config)
            config.num_blocks = num_blocks
            manager = make(config)
            for block in manager.block_pool.blocks:
                block.block_id += base
            self.managers.append(manager)
        self._max_model_len = max_model_len
        self._max_blocks = max_blocks
        self._owner: dict[str, int] = {}
        self._expected_blocks: dict[str, int] = {}
        self.placing_rank = 0
        """Rank of the request that the scheduler looked up last."""
        self.starved_rank: int | None = None
        """Rank that had no room for a running request, until somebody there is preempted."""

        first = self.managers[0]
        self.kv_cache_config = kv_cache_config
        self.empty_kv_cache_blocks = first.empty_kv_cache_blocks
        self.num_kv_cache_groups = first.num_kv_cache_groups
        self.enable_caching = first.enable_caching
        self.mamba_shared_prefix_checkpoint = first.mamba_shared_prefix_checkpoint
        # Any rank's pool will do: BlockPool.free_blocks passes a block of another pool on to that pool.
        self.block_pool = first.block_pool
        self.coordinator = _CoordinatorView(self)

    def manager_of(self, request_id: str) -> KVCacheManager:
        """The manager of the rank that the request lives on."""
        return self.managers[self._owner[request_id]]

    def rank_of(self, request_id: str) -> int | None:
        """The rank that the request lives on; None if it has no place."""
        return self._owner.get(request_id)

    def requests_per_rank(self) -> list[int]:
        """Number of requests that hold a place on each rank."""
        counts = [0] * self.partition.size
        for rank in self._owner.values():
            counts[rank] += 1
        return counts

    def free_blocks_per_rank(self) -> list[int]:
        """Number of free blocks of each rank; cached blocks that nobody uses count as free."""
        return [manager.block_pool.get_num_free_blocks() for manager in self.managers]

    # -- placement --

    def get_computed_blocks(self, request: Request) -> tuple[KVCacheBlocks, int, int]:
        """Chooses the request's rank and returns the prefix hit there. Until `allocate_slots` succeeds the place is
        tentative: a request that has to wait is looked up, and so placed, again."""
        owner = self._owner.get(request.request_id)
        if owner is not None and any(self.get_blocks(request.request_id).blocks):
            # vLLM looks up whatever has no computed token. So has a request whose only prompt token was pulled, since
            # the last prompt token is always computed; it stays where its block is.
            self.placing_rank = owner
            blocks, num_tokens, boundary = self.managers[owner].get_computed_blocks(request)
            return blocks, num_tokens, boundary
        hits = [manager.get_computed_blocks(request) for manager in self.managers]
        self._forget(request.request_id)
        requests = self.requests_per_rank()
        expected = [0] * self.partition.size
        for request_id, rank in self._owner.items():
            expected[rank] += self._expected_blocks[request_id]
        other_work = self._root_work(sum(requests) + 1, sum(expected))
        ranks = [
            RankState(
                num_blocks=num_blocks - 1,  # less the null block
                num_free_blocks=free,
                expected_blocks=expected[rank],
                num_requests=requests[rank],
                num_hit_tokens=hits[rank][1],
                num_needed_blocks=self._blocks_for(request.num_tokens) - (held := self._blocks_for(hits[rank][1])),
                num_hit_blocks=held,
                other_work=0 if rank else other_work,
            )
            for rank, (num_blocks, free) in enumerate(
                zip(self.partition.num_blocks, self.free_blocks_per_rank(), strict=True)
            )
        ]
        longest = min(request.num_prompt_tokens + request.max_tokens, self._max_model_len)
        rank = self.placing_rank = choose_rank(ranks, max_request_blocks=self._blocks_for(longest))
        self._owner[request.request_id] = rank
        # Nobody knows where a request will stop; half of what it may still write is the guess. One that stops at its
        # first token is no work for the steps after it, however long what it found is kept for others.
        self._expected_blocks[request.request_id] = (
            ranks[rank].num_needed_blocks
            if request.max_tokens == 1
            else self._blocks_for((request.num_tokens + longest) // 2)
        )
        blocks, num_tokens, shared_prefix_boundary = hits[rank]
        return blocks, num_tokens, shared_prefix_boundary

    def get_computed_blocks_for_connector(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        return *self.get_computed_blocks(request), False

    def allocate_slots(self, request: Request, *args: Any, **kwargs: Any) -> KVCacheBlocks | None:
        rank = self._owner[request.request_id]
        blocks = self.managers[rank].allocate_slots(request, *args, **kwargs)
        self.starved_rank = rank if blocks is None and request.status == RequestStatus.RUNNING else None
        return blocks

    def _blocks_for(self, num_tokens: int) -> int:
        """Blocks of all groups that a request of `num_tokens` holds at most."""
        groups = zip(self.managers[0].coordinator.single_type_managers, self._max_blocks, strict=True)
        return sum(min(-(-num_tokens // group.block_size), most) for group, most in groups)

    def _root_work(self, num_requests: int, num_blocks: int) -> int:
        """See RankState.other_work. Blocks here are those of all KV cache groups, which are taken to have as many each;
        the rule's are those of the first."""
        overlap, num_groups = get_overlap(), len(self._max_blocks)
        return 0 if overlap is None else overlap.root_work(num_requests, num_blocks // num_groups) * num_groups

    def _forget(self, request_id: str) -> int | None:
        self._expected_blocks.pop(request_id, None)
        return self._owner.pop(request_id, None)

    # -- one request --

    def free(self, request: Request) -> None:
        rank = self._forget(request.request_id)
        if rank is not None:
            self.managers[rank].free(request)

    def pop_blocks_for_free(self, request: Request) -> list[Any]:
        rank = self._forget(request.request_id)
        return [] if rank is None else list(self.managers[rank].pop_blocks_for_free(request))

    def get_blocks(self, request_id: str) -> KVCacheBlocks:
        return self.manager_of(request_id).get_blocks(request_id)

    def get_block_ids(self, request_id: str) -> Any:
        return self.manager_of(request_id).get_block_ids(request_id)

    def get_block_ids_for_computed_tokens(self, request_id: str, num_computed_tokens: int) -> Any:
        return self._manager_or_first(request_id).get_block_ids_for_computed_tokens(request_id, num_computed_tokens)

    def remove_skipped_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> None:
        self._manager_or_first(request_id).remove_skipped_blocks(request_id, *args, **kwargs)

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        self.manager_of(request.request_id).cache_blocks(request, num_computed_tokens)

    def estimate_cached_tokens(self, request: Request) -> int:
        return int(self._manager_or_first(request.request_id).estimate_cached_tokens(request))

    def finalize_partial_tail_offloads(self, request: Request) -> list[tuple[int, int, int]]:
        return list(self._manager_or_first(request.request_id).finalize_partial_tail_offloads(request))

    def record_blocks_for_zeroing(self, request_id: str, start_token: int) -> None:
        self.manager_of(request_id).record_blocks_for_zeroing(request_id, start_token)

    def truncate_computed_blocks(self, blocks: KVCacheBlocks, num_computed_tokens: int) -> KVCacheBlocks:
        return self.managers[0].truncate_computed_blocks(blocks, num_computed_tokens)

    def _manager_or_first(self, request_id: str) -> KVCacheManager:
        # A request that ends before it was ever placed is asked about too; it has no blocks in any manager.
        return self.managers[self._owner.get(request_id, 0)]

    # -- all ranks --

    @property
    def usage(self) -> float:
        """Share of all ranks' blocks in use, 0 to 1."""
        usable = self.partition.total - self.partition.size
        return 1.0 - sum(self.free_blocks_per_rank()) / usable

    def evict_blocks(self, block_ids: set[int]) -> None:
        for rank, manager in enumerate(self.managers):
            base = self.partition.bases[rank]
            manager.evict_blocks({i - base for i in block_ids if self.partition.rank_of(i) == rank})

    def reset_prefix_cache(self) -> bool:
        # Every rank's, also after one refused.
        resets = [manager.reset_prefix_cache() for manager in self.managers]
        return all(resets)

    def new_step_starts(self) -> None:
        self.starved_rank = None
        for manager in self.managers:
            manager.new_step_starts()

    def take_events(self) -> list[Any]:
        return [event for manager in self.managers for event in manager.take_events()]

    def take_new_block_ids(self) -> list[int]:
        return [block_id for manager in self.managers for block_id in manager.take_new_block_ids()]

    def take_kv_cache_block_copies(self) -> tuple[list[Any], list[Any]]:
        taken = [manager.take_kv_cache_block_copies() for manager in self.managers]
        return [copy_ for copies, _ in taken for copy_ in copies], [block for _, blocks in taken for block in blocks]

    def take_boundary_state_offloads(self) -> dict[str, list[tuple[int, int, int]]]:
        return dict(_items(manager.take_boundary_state_offloads() for manager in self.managers))

    # Prefix cache statistics are the engine's, not a rank's.

    def make_prefix_cache_stats(self) -> Any:
        return self.managers[0].make_prefix_cache_stats()

    def record_prefix_cache_stats(self, request: Request, num_hits: int) -> None:
        self.managers[0].record_prefix_cache_stats(request, num_hits)

    def prefix_cache_lookup_enabled(self, request: Request) -> bool:
        return bool(self.managers[0].prefix_cache_lookup_enabled(request))


def _items(dicts: Iterator[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    for entries in dicts:
        yield from entries.items()
