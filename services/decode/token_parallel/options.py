"""The token-parallel settings of a vLLM engine, and what cannot be combined with them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# Where the settings travel in vLLM's configuration: `--additional-config '{"token_parallel": {...}}'` reaches every
# process.
CONFIG_KEY = "token_parallel"


ON_ROOTS, SPREAD = WEIGHTS = ("root", "spread")
"""Where the weights are: on T of the T x P workers, or divided among all of them."""

TESTED_WEIGHTS = (None, "fp8", "compressed-tensors")
"""vLLM's names of quantisation methods: tests/gpu and tests/e2e hold the tokens of these equal to plain vLLM's."""


class UnsupportedConfigurationError(ValueError):
    """Token parallelism was asked for together with something that it does not cover."""


@dataclass(frozen=True)
class Nodes:
    """The hosts of one engine, by vLLM's names: `--nnodes`, `--node-rank`, `--master-addr`, `--master-port`.

    Attributes:
        count: number of hosts.
        rank: this host's; 0 holds the root, serves HTTP and schedules.
        master_addr: address of host 0 as the others reach it.
        master_port: a free TCP port there; the next one must be free too.
    """

    count: int
    rank: int
    master_addr: str
    master_port: int = 29501

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.count:
            raise UnsupportedConfigurationError(
                f"--node-rank is {self.rank}; with --nnodes {self.count} it is one of 0 to {self.count - 1}"
            )


@dataclass(frozen=True)
class TokenParallelOptions:
    """Settings of token parallelism.

    Attributes:
        size: number of token-parallel ranks; 1 means plain vLLM.
        blocks_per_rank: KV blocks of each rank, root first; None gives every rank what its memory holds.
        overlap_from: rows from which a decode step on GPUs runs in two micro-batches, so that the root computes matrix
            products while the others attend; 0 is never, None where it pays (overlap.py).
        nodes: the hosts that the ranks are spread over; None where there is only one, or Ray places them.
        weights: `root`, on the root workers alone, or `spread`, over the workers of all ranks.
    """

    size: int = 1
    blocks_per_rank: tuple[int, ...] | None = None
    overlap_from: int | None = None
    nodes: Nodes | None = None
    weights: str = ON_ROOTS

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UnsupportedConfigurationError(f"--token-parallel-size is {self.size}; it must be at least 1")
        if self.weights not in WEIGHTS:
            raise UnsupportedConfigurationError(
                f"--token-parallel-weights is {self.weights!r}; it is one of {', '.join(WEIGHTS)}"
            )
        if self.is_spread and self.nodes is not None:
            raise UnsupportedConfigurationError(
                f"--token-parallel-weights spread needs one machine, but --nnodes is {self.nodes.count}; weights on "
                "the roots alone (--token-parallel-weights root) don't"
            )
        if self.blocks_per_rank is not None and len(self.blocks_per_rank) != self.size:
            raise UnsupportedConfigurationError(
                f"blocks_per_rank names {len(self.blocks_per_rank)} ranks, but --token-parallel-size is {self.size}"
            )
        if self.nodes is not None and self.size % self.nodes.count:
            raise UnsupportedConfigurationError(
                f"--nnodes is {self.nodes.count}, but every host gets as many token-parallel ranks as the others and "
                f"--token-parallel-size is {self.size}; make it a multiple"
            )

    @property
    def is_spread(self) -> bool:
        """Whether every worker has a part of the weights; with one rank it is all the same."""
        return self.weights == SPREAD and self.size > 1

    @classmethod
    def of(cls, vllm_config: Any) -> TokenParallelOptions:
        """The options in a `VllmConfig`; the defaults where it holds none."""
        additional = getattr(vllm_config, "additional_config", None)
        given = additional.get(CONFIG_KEY) if isinstance(additional, dict) else None
        if not given:
            return cls()
        blocks, nodes = given.get("blocks_per_rank"), given.get("nodes")
        return cls(
            size=int(given["size"]),
            blocks_per_rank=tuple(blocks) if blocks else None,
            overlap_from=given.get("overlap_from"),
            nodes=Nodes(**nodes) if nodes else None,
            weights=given.get("weights", ON_ROOTS),
        )

    def as_config(self) -> dict[str, Any]:
        """The value for `--additional-config`."""
        config: dict[str, Any] = {"size": self.size}
        if self.blocks_per_rank is not None:
            config["blocks_per_rank"] = list(self.blocks_per_rank)
        if self.overlap_from is not None:
            config["overlap_from"] = self.overlap_from
        if self.nodes is not None:
            config["nodes"] = asdict(self.nodes)
        if self.weights != ON_ROOTS:
            config["weights"] = self.weights
        return {CONFIG_KEY: config}


def refuse_unsupported(vllm_config: Any) -> None:
    """Raises UnsupportedConfigurationError, naming every reason, where token parallelism is not covered by a test."""
    found = [name for name, present in _reasons(vllm_config).items() if present]
    if found:
        raise UnsupportedConfigurationError(
            f"token parallelism does not support {'; '.join(found)}. Use --token-parallel-size 1, or switch it off."
        )


def _reasons(vllm_config: Any) -> dict[str, bool]:
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
    is_quantised = cache.cache_dtype.startswith(("fp8", "int8", "nvfp4"))
    return {
        "decode context parallelism (--decode-context-parallel-size > 1)": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism (--prefill-context-parallel-size > 1)": parallel.prefill_context_parallel_size > 1,
        "pipeline parallelism (--pipeline-parallel-size > 1)": parallel.pipeline_parallel_size > 1,
        "data parallelism inside one engine (--data-parallel-size > 1); start several engines": (
            parallel.data_parallel_size > 1
        ),
        "several nodes (--nnodes > 1)": parallel.nnodes > 1,
        "expert parallelism (--enable-expert-parallel)": bool(parallel.enable_expert_parallel),
        "elastic expert parallelism": bool(parallel.enable_elastic_ep),
        "micro-batching (--enable-dbo)": bool(parallel.enable_dbo),
        "--worker-extension-cls": bool(parallel.worker_extension_cls),
        "sleep mode": bool(model.enable_sleep_mode),
        "encoder-decoder models": bool(model.is_encoder_decoder),
        "multimodal models": bool(model.is_multimodal_model),
        "pooling models": model.runner_type == "pooling",
        "Mamba or linear attention": bool(model.is_hybrid or model.is_attention_free),
        "multi-head latent attention (MLA), whose layers KV workers can't make yet": bool(model.use_mla),
        f"{model.quantization} weights, of quantised ones only fp8 and compressed-tensors": (
            model.quantization not in TESTED_WEIGHTS
        ),
        "--max-model-len auto, which would be fitted to the sum of the ranks; give the number of tokens": (
            model.original_max_model_len == -1
        ),
        "speculative decoding": vllm_config.speculative_config is not None,
        "LoRA adapters": vllm_config.lora_config is not None,
        "priority scheduling (--scheduling-policy priority)": scheduler.policy != "fcfs",
        "--kv-sharing-fast-prefill": bool(cache.kv_sharing_fast_prefill),
        "KV cache offloading (--kv-offloading-size)": bool(cache.kv_offloading_size),
        "a quantised KV cache (--kv-cache-dtype) on GPUs, whose queries are quantised before they travel": (
            is_quantised and vllm_config.device_config.device_type != "cpu"
        ),
        "host-resident sparse attention": vllm_config.attention_config.hisparse_config is not None,
        "reference sliding-window attention": model.rswa_window is not None,
        "this KV connector, only TokenParallelKVConnector as kv_consumer or kv_both, without bidirectional_kv_xfer": (
            not _knows_ranks(vllm_config.kv_transfer_config)
        ),
        **_reasons_of_offers(TokenParallelOptions.of(vllm_config), vllm_config),
        **_reasons_of_spread(TokenParallelOptions.of(vllm_config), parallel, model, is_quantised),
    }


def _reasons_of_offers(options: TokenParallelOptions, vllm_config: Any) -> dict[str, bool]:
    transfer = vllm_config.kv_transfer_config
    if transfer is None or not transfer.is_kv_producer:
        return {}
    on_ray = vllm_config.parallel_config.distributed_executor_backend == "ray"
    on_host = transfer.kv_buffer_device == "cpu" and vllm_config.device_config.device_type != "cpu"
    return {
        "KV cache kept for others (--kv-both) by ranks on several machines, or placed by Ray, which are reached at the "
        "first one's address": on_ray or options.nodes is not None,
        "KV cache kept for others (--kv-both) in host memory (kv_buffer_device cpu), which the root alone fills": (
            on_host
        ),
    }


def _reasons_of_spread(options: TokenParallelOptions, parallel: Any, model: Any, is_quantised: bool) -> dict[str, bool]:
    if not options.is_spread:
        return {}
    num_shards, num_kv_heads = parallel.tensor_parallel_size // options.size, model.get_total_num_kv_heads()
    return {
        f"--token-parallel-weights spread with --tensor-parallel-size {num_shards}, no multiple of the model's "
        f"{num_kv_heads} KV heads (tensor parallelism alone divides those)": num_shards % num_kv_heads != 0,
        "--token-parallel-weights spread with a quantised KV cache (--kv-cache-dtype)": is_quantised,
    }


def _knows_ranks(kv_transfer_config: Any) -> bool:
    # Any other connector would take the scheduler's global block ids for local ones on every rank.
    if kv_transfer_config is None:
        return True
    extra = kv_transfer_config.get_from_extra_config
    if kv_transfer_config.kv_connector == "DecodeBenchConnector":  # fills whole caches, for benchmarks
        return bool(extra("startup_fill", False))
    is_ours = kv_transfer_config.kv_connector == "TokenParallelKVConnector"
    return is_ours and kv_transfer_config.is_kv_consumer and not extra("bidirectional_kv_xfer", False)
