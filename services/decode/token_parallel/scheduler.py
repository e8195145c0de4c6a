"""vLLM's scheduler with one KV pool per token-parallel rank.

Two classes, because vLLM switches async scheduling by what the scheduler derives from. Select one with
`--scheduler-cls`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from services.decode.token_parallel.engine_state import EngineState, set_engine_state
from services.decode.token_parallel.kv_cache_manager import PartitionedKVCacheManager
from tknp.common.partition import get_partition

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm.v1.request import Request


class RunningRequests(list[Any]):
    """The running requests, whose *last* one is the last of the rank that ran out of blocks.

    When a running request gets no block, vLLM preempts `running[-1]` and tries again (v1/core/sched/scheduler.py,
    schedule). Only a victim on the same rank frees what is missing. Such a victim never stands before the starving
    request itself, which is what vLLM's loop relies on.
    """

    def __init__(self, requests: Iterable[Any], manager: PartitionedKVCacheManager | None) -> None:
        super().__init__(requests)
        self._manager = manager

    def _victim(self) -> int:
        starved = None if self._manager is None else self._manager.starved_rank
        if starved is not None and self._manager is not None:
            for index in range(len(self) - 1, -1, -1):
                if self._manager.rank_of(super().__getitem__(index).request_id) == starved:
                    return index
        return len(self) - 1

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(self._victim() if index == -1 else index)

    def pop(self, index: Any = -1) -> Any:
        return super().pop(self._victim() if index == -1 else index)


class _TokenParallelMixin:
    """What both schedulers add. Uses of vLLM's non-public names are held by
    tests/services/decode/test_vllm_contract.py."""

    kv_cache_manager: Any
    _running: RunningRequests

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        partition = get_partition()
        if partition is None:
            raise RuntimeError(
                "the token-parallel scheduler needs the token-parallel executor; start the engine with `tknp decode`"
            )
        specs = [group.kv_cache_spec for group in self.kv_cache_config.kv_cache_groups]
        self.kv_cache_manager = PartitionedKVCacheManager(
            self._make_manager,
            self.kv_cache_config,
            partition,
            self.max_model_len,
            [-(-spec.max_memory_usage_bytes(self.vllm_config) // spec.page_size_bytes) for spec in specs],
        )
        set_engine_state(EngineState(self.kv_cache_manager, self.connector))
        if self.connector is not None:
            self.connector.bind_kv_cache_manager(self.kv_cache_manager)
        self.running = self._running

    def _make_manager(self, kv_cache_config: Any) -> KVCacheManager:
        # The arguments with which Scheduler.__init__ makes its own.
        return KVCacheManager(
            kv_cache_config=kv_cache_config,
            max_model_len=self.max_model_len,
            max_in_flight_tokens=self.vllm_config.max_in_flight_tokens,
            enable_caching=self.cache_config.enable_prefix_caching,
            use_eagle=self.use_eagle_block_drop,
            num_prefill_lookahead=self.num_prefill_lookahead,
            log_stats=self.log_stats,
            enable_kv_cache_events=self.enable_kv_cache_events,
            dcp_world_size=self.dcp_world_size,
            pcp_world_size=1,
            scheduler_block_size=self.block_size,
            hash_block_size=self.hash_block_size,
            metrics_collector=self.kv_metrics_collector,
            watermark=self.scheduler_config.watermark,
            enable_mamba_shared_prefix_checkpoint=self.cache_config.enable_mamba_shared_prefix_checkpoint,
        )

    @property
    def running(self) -> RunningRequests:
        return self._running

    @running.setter
    def running(self, requests: Iterable[Any]) -> None:
        # vLLM assigns plain lists when it removes several requests at once.
        self._running = RunningRequests(requests, getattr(self, "kv_cache_manager", None))

    def _inflight_prefill_reserved_blocks(self) -> int:
        # vLLM keeps free what the prefills and loads in flight still need. Here each rank has room of its own, so
        # only those on the rank that is being looked at count.
        rank = self.kv_cache_manager.placing_rank
        return sum(
            self._request_remaining_blocks(request)
            for request in self._inflight_prefills
            if self.kv_cache_manager.rank_of(request.request_id) == rank
        )

    if TYPE_CHECKING:  # set by vLLM's Scheduler
        kv_cache_config: Any
        max_model_len: int
        connector: Any
        vllm_config: Any
        cache_config: Any
        scheduler_config: Any
        use_eagle_block_drop: bool
        num_prefill_lookahead: int
        log_stats: bool
        enable_kv_cache_events: bool
        dcp_world_size: int
        block_size: int
        hash_block_size: int
        kv_metrics_collector: Any
        _inflight_prefills: set[Request]

        def _request_remaining_blocks(self, request: Request) -> int: ...


class TokenParallelScheduler(_TokenParallelMixin, Scheduler):
    """For engines without async scheduling, CPU among them."""


class AsyncTokenParallelScheduler(_TokenParallelMixin, AsyncScheduler):
    """For engines with async scheduling."""
