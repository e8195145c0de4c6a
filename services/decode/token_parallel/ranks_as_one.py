"""What vLLM's executors must do differently where T tensor-parallel x P token-parallel workers look like T to vLLM.

vLLM itself believes in the workers with weights (grid.py): it hears only their specs and tokens, and the sum of all
ranks' memory. How the workers are started is left to the class that this is put in front of.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import statistics
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import (
    get_kv_cache_config_from_groups,
    get_max_concurrency_for_kv_cache_config,
)
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from services.decode.token_parallel.engine_state import get_engine_state
from services.decode.token_parallel.graph_setup import leave_out_fusion
from services.decode.token_parallel.grid import WorkerGrid
from services.decode.token_parallel.options import TokenParallelOptions, refuse_unsupported
from services.decode.token_parallel.overlap import Overlap, set_overlap
from tknp.common.partition import BlockPartition, set_partition

logger = init_logger(f"vllm.{__name__}")


class RanksAsOne(MultiprocExecutor):
    """In front of `MultiprocExecutor`, or of one that derives from it."""

    def _init_executor(self) -> None:
        refuse_unsupported(self.vllm_config)
        self._options = TokenParallelOptions.of(self.vllm_config)
        leave_out_fusion(self.vllm_config)
        self._grid = WorkerGrid.of(self.vllm_config)
        # Workers size their torch.distributed world, and vLLM its queues, by this; the engine core reads it no more.
        self.parallel_config.world_size = self._grid.num_workers
        self._start_workers()

    def _start_workers(self) -> None:
        super()._init_executor()

    def _get_parallel_sizes(self) -> tuple[int, int, int]:
        tensor, pipeline, prefill_context = super()._get_parallel_sizes()
        # vLLM only multiplies the three and compares with the world size.
        return tensor, pipeline * (self._grid.num_workers // self._grid.num_known), prefill_context

    def _get_output_rank(self) -> int:
        return 0

    def _describe(self, rank: int) -> str:
        token_parallel_rank, shard = self._grid.place(rank)
        role = "worker" if self._grid.is_spread else "KV worker" if token_parallel_rank else "root"
        return f"{role} of token-parallel rank {token_parallel_rank}, tensor-parallel rank {shard}"

    # -- what the engine core asks at start: P ranks look like one --

    def get_kv_cache_specs(self) -> list[Any]:
        return list(super().get_kv_cache_specs()[: self._grid.num_known])

    def get_supported_kv_cache_layouts(self) -> list[list[str]]:
        return list(super().get_supported_kv_cache_layouts()[: self._grid.num_known])

    def determine_available_memory(self) -> list[int]:
        """Bytes for KV cache of each worker that vLLM knows, together with those that have the same KV heads."""
        self._available = self._grid.by_shard(super().determine_available_memory())
        return [sum(self._available[self._grid.place(worker)[1]]) for worker in range(self._grid.num_known)]

    def initialize_from_config(self, kv_cache_configs: list[Any]) -> None:
        """Divides the blocks that the engine core planned for the sum of the ranks."""
        grid = self._grid
        of_shard = [known[0] for known in grid.by_shard(kv_cache_configs)]
        bytes_per_block = [c.kv_cache_tensors[0].size // c.num_blocks for c in of_shard]
        partition = self._divide(of_shard[0].num_blocks, bytes_per_block)
        # One request must fit on at least one rank, or it would wait for ever.
        largest = copy.copy(kv_cache_configs[0])
        largest.num_blocks = max(partition.num_blocks) - 1
        room = get_max_concurrency_for_kv_cache_config(self.vllm_config, largest)
        if room < 1:
            limit = self.vllm_config.model_config.max_model_len
            raise ValueError(
                f"--max-model-len is {limit} tokens, but a request lives on one of the {partition.size} token-parallel "
                f"ranks and the largest holds about {int(room * limit)} ({largest.num_blocks} KV blocks); lower "
                "--max-model-len or give the ranks more memory"
            )
        set_partition(partition)
        plans = [
            self._plan(of_shard[shard], partition.num_blocks[rank], bytes_per_block[shard])
            for rank, shard in map(grid.place, range(grid.num_workers))
        ]
        for plan in plans:
            plan.token_parallel_partition = partition
        logger.info("token parallelism: KV blocks per rank %s", partition.num_blocks)
        super().initialize_from_config(plans)

    def compile_or_warm_up_model(self) -> None:
        super().compile_or_warm_up_model()
        paces = super().collective_rpc("token_parallel_pace")
        root, per_block = paces[0], [pace for pace in paces[self._grid.num_known :] if pace]
        # For the scheduler, which is made after this.
        overlap = Overlap(root, statistics.fmean(per_block), self._options.size) if root and per_block else None
        set_overlap(overlap)
        if overlap is None:
            if root and root.whole:
                logger.warning(
                    "token parallelism: no KV worker has blocks enough to measure attention to %d rows, so no step "
                    "runs in two micro-batches; give it more, or say when they shall (--token-parallel-overlap-from)",
                    root.rows[-1],
                )
            return
        super().collective_rpc("set_token_parallel_overlap", args=(overlap,))
        logger.info(
            "token parallelism: steps of %d rows and more may run in two micro-batches; of %d rows the root's matrix "
            "products then take %.1f ms, as long as attention to %d KV blocks, and it is given that much less of it",
            root.rows[0],
            root.rows[-1],
            root.halved[-1] * 1e3,
            round(root.halved[-1] / overlap.block_seconds),
        )

    def _divide(self, total: int, bytes_per_block: list[int]) -> BlockPartition:
        room = [
            min(ranks[rank] // bytes_per_block[i] for i, ranks in enumerate(self._available))
            for rank in range(self._options.size)
        ]
        wanted = self._options.blocks_per_rank
        if wanted is None and self.cache_config.num_gpu_blocks_override:
            wanted = tuple(total // len(room) + (rank < total % len(room)) for rank in range(len(room)))
        wanted = wanted or tuple(room)
        if any(want > have for want, have in zip(wanted, room, strict=True)) or min(wanted) < 2:
            raise ValueError(
                f"the token-parallel ranks are to have {list(wanted)} KV blocks, at least 2 each, but their memory "
                f"holds {room}; give a rank more memory or ask for fewer blocks"
            )
        return BlockPartition(wanted, num_shards=self._grid.num_shards)

    def _plan(self, config: Any, num_blocks: int, bytes_per_block: int) -> Any:
        """`config` for a worker with `num_blocks`: vLLM's planner lays the layers out for the smaller size."""
        vllm_config = copy.copy(self.vllm_config)
        vllm_config.cache_config = copy.copy(self.cache_config)
        vllm_config.cache_config.num_gpu_blocks_override = None  # it is the total, already divided
        plan = get_kv_cache_config_from_groups(vllm_config, config.kv_cache_groups, num_blocks * bytes_per_block)
        for name in ("kv_cache_layout", "hash_block_size", "cache_hit_alignment_tokens", "kv_tp_replicas"):
            setattr(plan, name, getattr(config, name))
        return plan

    # -- status --

    def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's, with calls that ask for what the scheduler, in this process, knows: no worker is disturbed."""
        if method == "token_parallel_transfers":
            return [self._transfer_records(*kwargs.get("args", ()) or args[1])]
        if method == "token_parallel_room":
            return self._room()
        replies = super().collective_rpc(method, *args, **kwargs)
        if method == "token_parallel_status" and (room := self._room()):
            for status in replies:
                status.update(room[status["rank"]])
        return replies

    def _transfer_records(self, request_ids: list[str]) -> dict[str, dict[str, Any]]:
        state = get_engine_state()
        if state is None or state.connector is None or state.connector.connector_scheduler is None:
            return {}
        records = state.connector.connector_scheduler.records
        return {name: dataclasses.asdict(records[name]) for name in request_ids if name in records}

    def _room(self) -> list[dict[str, int]]:
        """Blocks and requests of each rank; empty while there is no scheduler yet."""
        state = get_engine_state()
        if state is None:
            return []
        manager = state.kv_cache_manager
        ranks = zip(
            manager.partition.num_blocks, manager.free_blocks_per_rank(), manager.requests_per_rank(), strict=True
        )
        return [
            {
                "rank": rank,
                "block_size": self.cache_config.block_size,
                "num_blocks": num_blocks - 1,  # the null block is nobody's
                "num_free_blocks": num_free,
                "num_requests": num_requests,
            }
            for rank, (num_blocks, num_free, num_requests) in enumerate(ranks)
        ]


def end_engine_core() -> None:
    """Ends this process, an engine core that has lost a rank on another host; its server then fails all requests.

    vLLM waits for the answer of such a rank in a poll that nothing wakes, for VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS
    (distributed/device_communicators/shm_broadcast.py, MessageQueue.recv).
    """
    logging.shutdown()
    os._exit(1)
