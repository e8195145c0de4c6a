"""The vLLM engine options that switch token parallelism on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.decode.token_parallel.options import TokenParallelOptions, UnsupportedConfigurationError

_PACKAGE = "services.decode.token_parallel"


def engine_args(
    options: TokenParallelOptions,
    additional_config: Mapping[str, Any] | None = None,
    on_ray: bool = False,
    tensor_parallel_size: int = 1,
) -> dict[str, Any]:
    """Keyword arguments for vLLM's `EngineArgs`; none where `options.size` is 1, which is plain vLLM.

    Args:
        additional_config: the user's own, which ours is added to.
        on_ray: the ranks are actors on a Ray cluster, instead of processes here.
        tensor_parallel_size: as the user gave it: shards of the KV heads.

    Raises:
        UnsupportedConfigurationError: these options can't be had together.
    """
    if options.size == 1:
        return {}
    from vllm.platforms import current_platform

    # vLLM takes async scheduling from the scheduler's base class; it is always off on CPU.
    scheduler = "TokenParallelScheduler" if current_platform.is_cpu() else "AsyncTokenParallelScheduler"
    executor = "ray_executor.RayTokenParallelExecutor" if on_ray else "executor.TokenParallelExecutor"
    spread = {}
    if options.is_spread:
        if on_ray:
            raise UnsupportedConfigurationError(
                "--token-parallel-weights spread can't be had with Ray, which places ranks on several machines"
            )
        spread["tensor_parallel_size"] = tensor_parallel_size * options.size
    return {
        **spread,
        "worker_cls": f"{_PACKAGE}.worker.TokenParallelWorker",
        "scheduler_cls": f"{_PACKAGE}.scheduler.{scheduler}",
        "distributed_executor_backend": f"{_PACKAGE}.{executor}",
        "additional_config": {**(additional_config or {}), **options.as_config()},
    }
