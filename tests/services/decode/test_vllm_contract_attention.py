"""What the attention wrapper uses of vLLM, beyond its public interface. A new vLLM fails here first."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

import pytest
from vllm.model_executor.layers.attention import Attention, attention
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from services.decode.token_parallel import backends
from services.decode.token_parallel.layers import _HOST_SCALES, _SCALES, LayerSpec
from tests.services.contract import parameters, require, require_all, source, syntax_tree

ATTENTION = "services/decode/token_parallel/attention.py"
LAYERS = "services/decode/token_parallel/layers.py"
BACKENDS = "services/decode/token_parallel/backends.py"
BATCH = "services/decode/token_parallel/batch.py"
GRID = "services/decode/token_parallel/grid.py"
SPREAD = "services/decode/token_parallel/spread.py"

IMPL_ARGUMENTS = [
    "num_heads",
    "head_size",
    "scale",
    "num_kv_heads",
    "alibi_slopes",
    "sliding_window",
    "kv_cache_dtype",
    "logits_soft_cap",
    "attn_type",
    "kv_sharing_target_layer_name",
]
"""As `_make_layer` takes them apart."""


def test_the_layer_leaves_the_cache_to_a_backend_that_says_so() -> None:
    forward = source(Attention.forward)
    require(
        forward.count("not self.attn_backend.forward_includes_kv_cache_update") == 2, "Attention.forward", ATTENTION
    )
    require(forward.count("unified_kv_cache_update(") == 2, "who else writes the cache", ATTENTION)
    require(hasattr(AttentionBackend, "forward_includes_kv_cache_update"), "the backend's flag", ATTENTION)


def test_the_layer_hands_its_own_cache_and_metadata_to_forward() -> None:
    require("kv_cache = attn_layer.kv_cache" in source(attention.get_attention_context), "whose cache it is", ATTENTION)
    require("self.impl.forward( self, query, key, value, kv_cache," in source(_unwrapped_operation()), "…", ATTENTION)
    names = ["layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"]
    names += ["output_scale", "output_block_scale"]
    require(parameters(AttentionImpl.forward) == names, "parameters of AttentionImpl.forward", ATTENTION)


def _unwrapped_operation() -> Any:
    return inspect.unwrap(attention.unified_attention_with_output)


def test_an_implementation_is_made_of_these_arguments_in_this_order() -> None:
    tree = syntax_tree(textwrap.dedent(inspect.getsource(Attention.__init__)))
    made = next(n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "impl_cls")
    assert [ast.unparse(a) for a in made.args] == IMPL_ARGUMENTS, f"Attention makes its impl otherwise; see {LAYERS}"
    assert [ast.unparse(k.value) for k in made.keywords] == ["extra_impl_args"]
    impl = CPUAttentionBackend.get_impl_cls()
    assert parameters(impl.__init__)[: len(IMPL_ARGUMENTS)] == IMPL_ARGUMENTS, f"CPU's impl moved; see {LAYERS}"
    assert "args" in LayerSpec.__dataclass_fields__


def test_a_bare_layer_takes_these_arguments() -> None:
    wanted = {"num_kv_heads", "alibi_slopes", "cache_config", "logits_soft_cap", "per_layer_sliding_window", "prefix"}
    wanted |= {"attn_type", "kv_sharing_target_layer_name", "head_size_v"}
    signature = inspect.signature(Attention.__init__).parameters
    require_all(wanted - set(signature), "arguments of Attention", LAYERS)
    assert list(signature)[1:4] == ["num_heads", "head_size", "scale"]
    # A new argument may be one that changes what a layer computes, and would have to reach KV workers too.
    known = {"use_alibi_sqrt", "quant_config", "mm_prefix_clamp_sliding_window", "attn_backend", "extra_impl_args"}
    new = set(signature) - wanted - known - {"self", "num_heads", "head_size", "scale"}
    require_all(new, "new arguments of Attention", LAYERS)


def test_scales_bear_these_names() -> None:
    text = inspect.getsource(attention)
    require_all((n for n in (*_SCALES, *_HOST_SCALES) if n not in text), "scales of Attention", LAYERS)
    require(hasattr(AttentionImpl, "process_weights_after_loading"), "process_weights_after_loading", LAYERS)


def test_layers_are_registered_by_name_in_the_order_of_their_making() -> None:
    require("static_forward_context[prefix] = self" in source(Attention.__init__), "where layers are listed", LAYERS)


@pytest.mark.parametrize("name", backends.WRAPPED)
def test_every_wrapped_backend_exists_under_a_path_that_can_be_overridden(name: str) -> None:
    member = AttentionBackendEnum[name]
    require("." in member.value, "the enum's value is vLLM's own path", BACKENDS)
    require(callable(member.is_overridden), "is_overridden", "services/decode/token_parallel/plugin.py")
    require(parameters(register_backend)[:2] == ["backend", "class_path"], "register_backend", BACKENDS)


def test_the_platform_s_backend_is_built_as_the_wrapper_expects() -> None:
    inner = resolve_obj_by_qualname(AttentionBackendEnum.CPU_ATTN.value)
    assert inner is CPUAttentionBackend
    builder = inner.get_builder_cls()
    arguments = ["common_prefix_len", "common_attn_metadata", "fast_build"]
    require(parameters(AttentionMetadataBuilder.build) == arguments, "parameters of build", ATTENTION)
    require(parameters(builder.build) == arguments, "parameters of CPU's build", ATTENTION)
    require("self.layer_names = layer_names" in source(AttentionMetadataBuilder.__init__), "layer_names", ATTENTION)
    require(hasattr(inner.get_impl_cls(), "do_kv_cache_update"), "do_kv_cache_update", ATTENTION)
    update = parameters(inner.get_impl_cls().do_kv_cache_update)
    require(update == ["layer", "key", "value", "kv_cache", "slot_mapping"], "its parameters", ATTENTION)


def test_the_flags_that_the_wrapper_sets_are_read_under_these_names() -> None:
    require(hasattr(AttentionMetadataBuilder, "_cudagraph_support"), "_cudagraph_support", ATTENTION)
    require("_cudagraph_support" in source(AttentionMetadataBuilder.get_cudagraph_support), "who reads it", ATTENTION)
    require(hasattr(AttentionMetadataBuilder, "supports_update_block_table"), "supports_update_block_table", ATTENTION)
    require(hasattr(AttentionCGSupport, "NEVER"), "AttentionCGSupport.NEVER", ATTENTION)


def test_every_fused_operation_is_known_and_declined() -> None:
    fused = {name for name in dir(AttentionImpl) if name.startswith("fused_") and name.endswith("_supported")}
    known = {
        "fused_output_quant_supported",
        "fused_rope_kvcache_supported",
        "fused_qk_norm_rope_kvcache_supported",
        "fused_qk_norm_mrope_kvcache_supported",
    }
    require_all(fused ^ known, "fused operations of AttentionImpl", ATTENTION)


def test_metadata_of_a_batch_has_these_fields() -> None:
    filled = {"query_start_loc", "query_start_loc_cpu", "seq_lens", "seq_lens_cpu_upper_bound", "num_reqs"}
    filled |= {"num_actual_tokens", "max_query_len", "max_seq_len", "block_table_tensor", "slot_mapping", "causal"}
    fields: Any = CommonAttentionMetadata.__dataclass_fields__
    require_all(filled - set(fields), "fields of CommonAttentionMetadata", BATCH)
    missing = inspect.signature(CommonAttentionMetadata).parameters.values()
    require_all({p.name for p in missing if p.default is p.empty} - filled, "fields that must be given", BATCH)


def test_the_cpu_kernel_reads_no_field_that_batches_do_not_fill() -> None:
    tree = syntax_tree(textwrap.dedent(inspect.getsource(CPUAttentionBackend.get_builder_cls().build)))
    read = {
        n.attr
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "common_attn_metadata"
    }
    filled = {"query_start_loc", "query_start_loc_cpu", "seq_lens", "seq_lens_cpu_upper_bound", "num_reqs"}
    filled |= {"num_actual_tokens", "max_query_len", "max_seq_len", "block_table_tensor", "slot_mapping", "causal"}
    require_all(read - filled - {"positions"}, "fields that CPU's builder reads", BATCH)  # positions: encoders only


def test_neighbours_have_copies_of_a_kv_head_where_there_are_more_workers_than_heads() -> None:
    linear = source(resolve_obj_by_qualname("vllm.model_executor.layers.linear.QKVParallelLinear"))
    replicas = "self.num_kv_head_replicas"
    require(f"{replicas} = divide(tp_size, self.total_num_kv_heads)" in linear, "how KV heads are copied", GRID)
    require(f"shard_rank = self.tp_rank // {replicas}" in linear, "who has the same KV head", GRID)


@pytest.mark.parametrize("name", backends.WRAPPED)
def test_metadata_builders_count_the_heads_of_the_implementation(name: str) -> None:
    counted = "vllm.v1.attention.backends.utils.get_num_attention_heads_from_layers"
    require('getattr(layer, "impl", layer)).num_heads' in source(resolve_obj_by_qualname(counted)), counted, ATTENTION)
    backend = resolve_obj_by_qualname(AttentionBackendEnum[name].value)
    require(
        "get_num_attention_heads_from_layers(" in source(backend.get_builder_cls()),
        f"how many heads {name} plans for",
        ATTENTION,
    )


@pytest.mark.parametrize("name", backends.WRAPPED)
def test_caches_can_be_written_without_attending(name: str) -> None:
    backend = resolve_obj_by_qualname(AttentionBackendEnum[name].value)
    require(not backend.forward_includes_kv_cache_update, f"{name} writes the cache where it attends", SPREAD)
