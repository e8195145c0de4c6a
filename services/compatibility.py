"""What must be equal for a decode engine to read a prefill engine's KV cache."""

from __future__ import annotations

from typing import Any


def kv_traits(vllm_config: Any) -> dict[str, str]:
    """Name -> value, as `GET /kv_traits` answers on engines of both kinds, so that a router can tell what does not
    fit before it sends anything.

    These are what an operator can get wrong among the factors of vLLM's own check at the handshake
    (distributed/kv_transfer/kv_connector/v1/nixl/metadata.py, compute_nixl_compatibility_hash), which has the last
    word. Tensor-parallel sizes, numbers of blocks and token-parallel sizes may differ.
    """
    from vllm import __version__

    model, cache = vllm_config.model_config, vllm_config.cache_config
    return {
        "vLLM version": __version__.split("+")[0],
        "model": str(model.model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "KV cache dtype": str(cache.cache_dtype),
        "hybrid KV cache manager": "off" if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager else "on",
    }


def kv_roles(vllm_config: Any) -> list[str]:
    """What the engine can be in a hand-off: `prefill`, `decode`, or both, as `GET /kv_roles` answers.

    It follows vLLM's `kv_role`. NIXL would let a `kv_producer` pull too, but its scheduler may then give blocks to a
    pull that a step still writes to (v1/core/sched/scheduler.py, `defer_block_free`): only `kv_both` is good for both.
    """
    transfer = vllm_config.kv_transfer_config
    if transfer is None:
        return []
    is_able = {"prefill": transfer.is_kv_producer, "decode": transfer.is_kv_consumer}
    return [role for role, able in is_able.items() if able]


def is_token_parallel(vllm_config: Any) -> bool:
    """Whether its KV cache is divided among ranks, by the worker that our options name (engine_args.py)."""
    return str(vllm_config.parallel_config.worker_cls).startswith("services.decode.token_parallel.")
