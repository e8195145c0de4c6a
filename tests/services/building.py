"""vLLM's own objects, small, without an engine process: the ground that these tests stand on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from services.decode.token_parallel.engine_args import engine_args
from services.decode.token_parallel.kv_cache_manager import PartitionedKVCacheManager
from services.decode.token_parallel.options import TokenParallelOptions
from services.decode.token_parallel.scheduler import TokenParallelScheduler
from tknp.common.partition import BlockPartition, set_partition

BLOCK_SIZE = 32
MAX_MODEL_LEN = 512


def silence_vllm() -> None:
    logging.getLogger("vllm").setLevel(logging.ERROR)


def tiny_config(model: Path, token_parallel_size: int = 2, pulls_kv: bool = False, **kwargs: Any) -> Any:
    """A real VllmConfig for `model`, as `tknp decode` would make it."""
    given: dict[str, Any] = {
        "max_model_len": MAX_MODEL_LEN,
        "block_size": BLOCK_SIZE,
        "dtype": "float32",
        "enforce_eager": True,
        "enable_prefix_caching": True,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,
        **engine_args(TokenParallelOptions(token_parallel_size)),
        **kwargs,
    }
    if pulls_kv:
        given["kv_transfer_config"] = KVTransferConfig(
            kv_connector="TokenParallelKVConnector",
            kv_connector_module_path="kv_transfer.connector",
            kv_role="kv_consumer",
            kv_buffer_device="cpu",
            kv_load_failure_policy="recompute",
        )
    return EngineArgs(model=str(model), **given).create_engine_config()


def kv_cache_config(num_blocks: int, windows: Sequence[int | None] = (None,)) -> KVCacheConfig:
    """One KV cache group for each of `windows`: None is full attention."""
    shape: dict[str, Any] = {
        "block_size": BLOCK_SIZE,
        "num_kv_heads": 2,
        "head_size": 32,
        "dtype": torch.float32,
    }
    specs = [
        FullAttentionSpec(**shape) if window is None else SlidingWindowSpec(**shape, sliding_window=window)
        for window in windows
    ]
    groups = [KVCacheGroupSpec([f"layers.{i}"], spec) for i, spec in enumerate(specs)]
    return KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups)


def partitioned_manager(
    num_blocks: Sequence[int], windows: Sequence[int | None] = (None,), **kwargs: Any
) -> PartitionedKVCacheManager:
    """vLLM's KVCacheManagers, one for each rank."""
    partition = BlockPartition(tuple(num_blocks))

    def make(config: Any) -> KVCacheManager:
        given: dict[str, Any] = {"enable_caching": True, "log_stats": True, **kwargs}
        return KVCacheManager(
            kv_cache_config=config,
            max_model_len=MAX_MODEL_LEN,
            scheduler_block_size=BLOCK_SIZE,
            hash_block_size=BLOCK_SIZE,
            **given,
        )

    config = kv_cache_config(partition.total, windows)
    whole = -(-MAX_MODEL_LEN // BLOCK_SIZE)
    # A sliding window spans one block more than it fills, wherever it begins; a chunk may be in flight too.
    most = [whole if window is None else min(whole, -(-window // BLOCK_SIZE) + 2) for window in windows]
    return PartitionedKVCacheManager(make, config, partition, MAX_MODEL_LEN, most)


def request(
    request_id: str, prompt: Sequence[int], max_tokens: int = 8, kv_transfer_params: dict[str, Any] | None = None
) -> Any:
    """A request as the engine core makes it."""
    init_none_hash(sha256)
    extra = {"kv_transfer_params": kv_transfer_params} if kv_transfer_params else None
    return Request(
        request_id,
        list(prompt),
        SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=extra),
        None,
        block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
    )


def scheduler(config: Any, partition: Sequence[int], windows: Sequence[int | None] = (None,)) -> TokenParallelScheduler:
    """The token-parallel scheduler with its connector, if `config` has one."""
    set_partition(BlockPartition(tuple(partition)))
    config.cache_config.num_gpu_blocks = sum(partition)
    return TokenParallelScheduler(
        vllm_config=config,
        kv_cache_config=kv_cache_config(sum(partition), windows),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
        log_stats=True,
    )


class Stepper:
    """Plays engine core and workers: schedules, and returns one token for each request whose prompt is done."""

    def __init__(self, scheduler: Any, on_step: Callable[[SchedulerOutput], None] | None = None) -> None:
        self.scheduler = scheduler
        self.num_steps = 0
        self._on_step = on_step

    def step(self, kv: KVConnectorOutput | None = None) -> SchedulerOutput:
        """One step; `kv` is what the workers report of KV transfer."""
        self.num_steps += 1
        output = self.scheduler.schedule()
        if self._on_step is not None:
            self._on_step(output)
        ids = list(output.num_scheduled_tokens)
        sampled = [[self.num_steps] if self._samples(i) else [] for i in ids]
        self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={r: i for i, r in enumerate(ids)},
                sampled_token_ids=sampled,
                kv_connector_output=kv,
            ),
        )
        return output

    def finish(self, limit: int = 2000) -> None:
        """Steps until nobody is left.

        Raises:
            AssertionError: after `limit` steps somebody still is.
        """
        for _ in range(limit):
            if not self.scheduler.has_unfinished_requests():
                return
            self.step()
        raise AssertionError(f"requests are stuck: {list(self.scheduler.requests)}")

    def _samples(self, request_id: str) -> bool:
        # vLLM has advanced num_computed_tokens already.
        request = self.scheduler.requests[request_id]
        return bool(request.num_computed_tokens >= request.num_tokens)
