from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.config import set_current_vllm_config
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from services.decode.token_parallel import backends
from services.decode.token_parallel.plugin import register
from tests.services.building import tiny_config


def resolved(config: Any) -> Any:
    register()
    with set_current_vllm_config(config):
        return AttentionBackendEnum.CPU_ATTN.get_class()


def test_size_one_gets_vllm_s_own_class(llama: Path) -> None:
    assert resolved(tiny_config(llama, 1)) is CPUAttentionBackend


def test_outside_any_engine_it_is_vllm_s_own_class_too() -> None:
    register()
    assert AttentionBackendEnum.CPU_ATTN.get_class() is CPUAttentionBackend


def test_a_token_parallel_engine_gets_a_subclass_that_vllm_takes_for_the_same_backend(llama: Path) -> None:
    backend = resolved(tiny_config(llama, 2))
    assert backend is not CPUAttentionBackend
    assert issubclass(backend, CPUAttentionBackend)
    assert issubclass(backend.get_impl_cls(), CPUAttentionBackend.get_impl_cls())
    assert issubclass(backend.get_builder_cls(), CPUAttentionBackend.get_builder_cls())
    # Prefill engines compare names at the NIXL handshake.
    assert backend.get_name() == CPUAttentionBackend.get_name()
    assert backend.forward_includes_kv_cache_update
    assert backend.get_builder_cls()._cudagraph_support is AttentionCGSupport.NEVER
    assert not backend.get_builder_cls().supports_update_block_table


def test_the_wrapper_is_made_once_and_found_again_by_its_own_path(llama: Path) -> None:
    config = tiny_config(llama, 2)
    backend = resolved(config)
    assert resolved(config) is backend
    with set_current_vllm_config(config):
        assert getattr(backends, backend.__qualname__) is backend
    assert backend.__module__ == backends.__name__


def test_fused_operations_are_declined(llama: Path) -> None:
    impl = resolved(tiny_config(llama, 2)).get_impl_cls()
    assert not impl.fused_output_quant_supported(None, None)
    for name in (
        "fused_rope_kvcache_supported",
        "fused_qk_norm_rope_kvcache_supported",
        "fused_qk_norm_mrope_kvcache_supported",
    ):
        assert not getattr(impl, name)(None), name


def test_another_plugin_s_override_is_left_alone() -> None:
    member = AttentionBackendEnum.CPU_ATTN
    register()
    ours = member.get_path()
    register()
    assert member.get_path() == ours == f"{backends.__name__}.CPU_ATTN"


def test_an_unknown_backend_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="FLASHINFER"):
        _ = backends.FLASHINFER
