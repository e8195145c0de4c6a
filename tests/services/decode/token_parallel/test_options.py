from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import KVTransferConfig

from services.decode.token_parallel.engine_args import engine_args
from services.decode.token_parallel.options import (
    TESTED_WEIGHTS,
    Nodes,
    TokenParallelOptions,
    UnsupportedConfigurationError,
    refuse_unsupported,
)
from tests.services.building import tiny_config


@pytest.fixture(scope="module")
def supported(llama: Path) -> Any:
    return tiny_config(llama, pulls_kv=True)


def changed(config: Any, path: str, value: Any) -> Any:
    """A copy of a real VllmConfig with one attribute, `section.name` or `name`, replaced. vLLM itself refuses to build
    most of these combinations for a tiny Llama on CPU."""
    config = copy.copy(config)
    section, _, name = path.rpartition(".")
    if section:
        part = copy.copy(getattr(config, section))
        setattr(config, section, part)
    else:
        part = config
    object.__setattr__(part, name, value)
    return config


def test_what_tknp_decode_starts_by_default_is_supported(supported: Any) -> None:
    refuse_unsupported(supported)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("parallel_config.decode_context_parallel_size", 2, "--decode-context-parallel-size"),
        ("parallel_config.prefill_context_parallel_size", 2, "--prefill-context-parallel-size"),
        ("parallel_config.pipeline_parallel_size", 2, "--pipeline-parallel-size"),
        ("parallel_config.data_parallel_size", 2, "--data-parallel-size"),
        ("parallel_config.nnodes", 2, "--nnodes"),
        ("parallel_config.enable_expert_parallel", True, "--enable-expert-parallel"),
        ("parallel_config.enable_elastic_ep", True, "elastic expert parallelism"),
        ("parallel_config.enable_dbo", True, "--enable-dbo"),
        ("model_config.enable_sleep_mode", True, "sleep mode"),
        ("model_config.runner_type", "pooling", "pooling models"),
        ("speculative_config", SimpleNamespace(), "speculative decoding"),
        ("lora_config", SimpleNamespace(), "LoRA"),
        ("scheduler_config.policy", "priority", "--scheduling-policy priority"),
        ("cache_config.kv_sharing_fast_prefill", True, "--kv-sharing-fast-prefill"),
        ("cache_config.kv_offloading_size", 4.0, "--kv-offloading-size"),
        ("parallel_config.worker_extension_cls", "a.B", "--worker-extension-cls"),
        ("model_config.original_max_model_len", -1, "--max-model-len auto"),
    ],
)
def test_what_is_refused_is_named(supported: Any, path: str, value: Any, named: str) -> None:
    with pytest.raises(UnsupportedConfigurationError, match=named) as error:
        refuse_unsupported(changed(supported, path, value))
    assert "--token-parallel-size 1" in str(error.value)


@pytest.mark.parametrize(
    ("attribute", "named"),
    [
        ("is_encoder_decoder", "encoder-decoder"),
        ("is_multimodal_model", "multimodal"),
        ("is_hybrid", "Mamba"),
        ("is_attention_free", "Mamba"),
        ("use_mla", "MLA"),
        ("rswa_window", "sliding-window"),
    ],
)
def test_models_that_are_refused(supported: Any, attribute: str, named: str) -> None:
    # Properties of ModelConfig that only another model would answer with True: hence a stand-in.
    names = ("is_encoder_decoder", "is_multimodal_model", "is_hybrid", "is_attention_free", "use_mla")
    answers: dict[str, Any] = {name: getattr(supported.model_config, name) for name in names}
    model = SimpleNamespace(
        enable_sleep_mode=False,
        runner_type="generate",
        rswa_window=None,
        original_max_model_len=512,
        quantization=None,
        **answers,
    )
    refuse_unsupported(changed(supported, "model_config", model))
    setattr(model, attribute, 64)
    with pytest.raises(UnsupportedConfigurationError, match=named):
        refuse_unsupported(changed(supported, "model_config", model))


def test_all_reasons_are_told_at_once(supported: Any) -> None:
    config = changed(changed(supported, "lora_config", SimpleNamespace()), "parallel_config.enable_dbo", True)
    with pytest.raises(UnsupportedConfigurationError, match=r"enable-dbo.*LoRA"):
        refuse_unsupported(config)


KEEPING = KVTransferConfig(
    kv_connector="TokenParallelKVConnector",
    kv_connector_module_path="kv_transfer.connector",
    kv_role="kv_both",
    kv_buffer_device="cpu",
)


def test_ranks_may_keep_kv_cache_for_others(supported: Any) -> None:
    refuse_unsupported(changed(supported, "kv_transfer_config", KEEPING))


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("parallel_config.distributed_executor_backend", "ray", "placed by Ray"),
        ("device_config.device_type", "cuda", "in host memory"),
    ],
)
def test_but_not_where_nobody_would_find_it(supported: Any, path: str, value: Any, named: str) -> None:
    keeping = changed(supported, "kv_transfer_config", KEEPING)
    with pytest.raises(UnsupportedConfigurationError, match=named):
        refuse_unsupported(changed(keeping, path, value))


@pytest.mark.parametrize(
    "connector",
    [
        {"kv_connector": "NixlConnector", "kv_role": "kv_consumer"},
        {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"},
        {
            "kv_connector": "TokenParallelKVConnector",
            "kv_connector_module_path": "kv_transfer.connector",
            "kv_role": "kv_consumer",
            "kv_connector_extra_config": {"bidirectional_kv_xfer": True},
        },
    ],
)
def test_a_connector_that_knows_nothing_of_ranks_is_refused(supported: Any, connector: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedConfigurationError, match="connector"):
        refuse_unsupported(changed(supported, "kv_transfer_config", KVTransferConfig(**connector)))


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_below_one_is_refused(size: int) -> None:
    with pytest.raises(UnsupportedConfigurationError, match=f"{size}; it must be at least 1"):
        TokenParallelOptions(size)


def test_block_counts_must_name_every_rank() -> None:
    with pytest.raises(UnsupportedConfigurationError, match=r"names 3 ranks.*is 2"):
        TokenParallelOptions(2, (10, 10, 10))


@pytest.mark.parametrize(
    "options",
    [TokenParallelOptions(3), TokenParallelOptions(2, (300, 100)), TokenParallelOptions(2, weights="spread")],
)
def test_options_survive_the_way_through_vllm_s_configuration(llama: Path, options: TokenParallelOptions) -> None:
    config = tiny_config(llama, options.size, additional_config=options.as_config())
    assert TokenParallelOptions.of(config) == options


@pytest.mark.parametrize("holder", [SimpleNamespace(), SimpleNamespace(additional_config={"else": 1})])
def test_a_configuration_without_options_is_plain_vllm(holder: Any) -> None:
    assert TokenParallelOptions.of(holder) == TokenParallelOptions(1)


def test_size_one_adds_nothing_to_vllm_s_arguments() -> None:
    assert engine_args(TokenParallelOptions(1)) == {}


def test_vllm_finds_every_class_that_the_arguments_name(supported: Any) -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.executor.abstract import Executor

    assert resolve_obj_by_qualname(supported.parallel_config.worker_cls).__name__ == "TokenParallelWorker"
    assert supported.scheduler_config.get_scheduler_cls().__name__ == "TokenParallelScheduler"
    assert Executor.get_class(supported).__name__ == "TokenParallelExecutor"


def test_a_quantised_kv_cache_is_refused_on_gpus_alone(supported: Any) -> None:
    quantised = changed(supported, "cache_config.cache_dtype", "fp8")
    refuse_unsupported(quantised)
    with pytest.raises(UnsupportedConfigurationError, match=r"--kv-cache-dtype.*quantised before they travel"):
        refuse_unsupported(changed(quantised, "device_config", SimpleNamespace(device_type="cuda")))


@pytest.mark.parametrize("method", [None, "fp8", "compressed-tensors", "gguf", "bitsandbytes", "modelopt_fp4"])
def test_quantised_weights_are_taken_where_their_tokens_are_tested(supported: Any, method: str | None) -> None:
    config = changed(supported, "model_config.quantization", method)
    if method in TESTED_WEIGHTS:
        refuse_unsupported(config)
    else:
        with pytest.raises(UnsupportedConfigurationError, match=f"{method} weights"):
            refuse_unsupported(config)


def test_nodes_travel_in_the_configuration(llama: Path) -> None:
    given = TokenParallelOptions(4, nodes=Nodes(2, 1, "10.0.0.1", 7000))
    config = tiny_config(llama, additional_config=given.as_config())
    assert TokenParallelOptions.of(config) == given
    refuse_unsupported(config)


@pytest.mark.parametrize(("count", "rank"), [(2, 2), (2, -1)])
def test_a_node_that_is_none_of_them_is_refused(count: int, rank: int) -> None:
    with pytest.raises(
        UnsupportedConfigurationError, match=f"--node-rank is {rank}; with --nnodes 2 it is one of 0 to"
    ):
        Nodes(count, rank, "10.0.0.1")


def test_ranks_that_the_nodes_cannot_share_evenly_are_refused() -> None:
    with pytest.raises(UnsupportedConfigurationError, match=r"--nnodes is 2.*--token-parallel-size is 3"):
        TokenParallelOptions(3, nodes=Nodes(2, 0, "10.0.0.1"))


def test_on_ray_another_executor_is_named() -> None:
    named = engine_args(TokenParallelOptions(2), on_ray=True)["distributed_executor_backend"]
    assert named == "services.decode.token_parallel.ray_executor.RayTokenParallelExecutor"


def spread(model: Path, num_shards: int) -> Any:
    options = TokenParallelOptions(2, weights="spread")
    return tiny_config(model, **engine_args(options, tensor_parallel_size=num_shards))


def test_spread_weights_are_tensor_parallel_over_all_ranks(llama: Path) -> None:
    # As many shards as the model has KV heads.
    config = spread(llama, 4)
    refuse_unsupported(config)
    assert config.parallel_config.tensor_parallel_size == 8
    assert engine_args(TokenParallelOptions(1, weights="spread"), tensor_parallel_size=4) == {}, "plain vLLM"


def test_spread_weights_are_refused_where_tensor_parallelism_alone_divides_the_kv_heads(llama: Path) -> None:
    with pytest.raises(UnsupportedConfigurationError, match=r"--tensor-parallel-size 2, no multiple.*4 KV heads"):
        refuse_unsupported(spread(llama, 2))


def test_spread_weights_are_refused_with_a_quantised_kv_cache(llama: Path) -> None:
    with pytest.raises(UnsupportedConfigurationError, match="spread with a quantised KV cache"):
        refuse_unsupported(changed(spread(llama, 4), "cache_config.cache_dtype", "fp8"))


def test_spread_weights_stay_on_one_machine() -> None:
    with pytest.raises(UnsupportedConfigurationError, match="spread needs one machine, but --nnodes is 2"):
        TokenParallelOptions(2, nodes=Nodes(2, 0, "10.0.0.1"), weights="spread")
    with pytest.raises(UnsupportedConfigurationError, match="can't be had with Ray"):
        engine_args(TokenParallelOptions(2, weights="spread"), on_ray=True)


def test_weights_can_be_in_two_places_only() -> None:
    with pytest.raises(UnsupportedConfigurationError, match="'everywhere'; it is one of root, spread"):
        TokenParallelOptions(2, weights="everywhere")
