from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.model_executor.layers.attention import Attention

from services.decode.token_parallel.layers import attention_layers


def config(backend: str, **impl: Any) -> Any:
    """Of a model with one attention layer on this backend."""
    layer = Attention.__new__(Attention)
    vars(layer).update(backend=SimpleNamespace(name=backend), impl=SimpleNamespace(**impl))
    return SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={"layers.0": layer}))


def test_layers_of_a_covered_backend_are_found_by_name() -> None:
    assert list(attention_layers(config("FLASH_ATTN", token_parallel_args=((), {})))) == ["layers.0"]


def test_a_backend_that_is_not_covered_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"covers the attention backends .*, but vLLM chose \['FLASHINFER'\]"):
        attention_layers(config("FLASHINFER"))


def test_a_plugin_that_was_not_loaded_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"FLASH_ATTN without tknp's part of it.*VLLM_PLUGINS"):
        attention_layers(config("FLASH_ATTN"))
