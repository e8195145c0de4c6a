"""Attention layers without a model: what a KV worker needs to attend like the root, and nothing more.

The root tells how each of its attention layers was made; a KV worker makes the same layers bare. So it starts in
seconds, for any model, and holds no weight but what attention itself uses (scales, and sinks where a model has them).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import set_default_torch_dtype

from services.decode.token_parallel.backends import WRAPPED

_SCALES = ("_q_scale", "_k_scale", "_v_scale", "_prob_scale")
_HOST_SCALES = (
    "_q_scale_float",
    "_k_scale_float",
    "_v_scale_float",
    "_prob_scale_float",
    "_k_scale_cpu",
    "_v_scale_cpu",
)


@dataclass(frozen=True)
class LayerSpec:
    """How to make one attention layer again.

    Attributes:
        args: positional arguments of vLLM's attention implementation: num_heads, head_size, scale, num_kv_heads,
            alibi_slopes, sliding_window, kv_cache_dtype, logits_soft_cap, attn_type, kv_sharing_target_layer_name.
        kwargs: its keyword arguments, sinks among them.
        scales: quantisation scales on the device.
        host_scales: their copies on the host.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    head_size_v: int
    scales: dict[str, torch.Tensor]
    host_scales: dict[str, Any]


def attention_layers(vllm_config: VllmConfig) -> dict[str, Any]:
    """The attention layers of this process, in the order in which the model runs them.

    Raises:
        RuntimeError: the model has layers that keep a cache but are not vLLM's `Attention`, or a backend that is not
            covered; or vLLM did not load our plugin.
    """
    context = vllm_config.compilation_config.static_forward_context
    # Subclasses attend in ways of their own, which a bare Attention on a KV worker would not repeat.
    layers = {name: layer for name, layer in context.items() if type(layer) is Attention}
    others = {type(layer).__name__ for layer in context.values() if hasattr(layer, "kv_cache")} - {"Attention"}
    if others:
        raise RuntimeError(
            f"token parallelism covers vLLM's Attention layers only, but this model also has {sorted(others)}"
        )
    unwrapped = {layer.backend.name for layer in layers.values() if not hasattr(layer.impl, "token_parallel_args")}
    if covered := unwrapped & set(WRAPPED):
        raise RuntimeError(
            f"vLLM chose the attention backend {', '.join(sorted(covered))} without tknp's part of it, since it has "
            "not loaded the plugin tknp: is the package installed here, and does VLLM_PLUGINS, if it is set, name tknp?"
        )
    if unwrapped:
        raise RuntimeError(
            f"token parallelism covers the attention backends {', '.join(WRAPPED)}, but vLLM chose "
            f"{sorted(unwrapped)}; choose another with --attention-backend"
        )
    return layers


def describe_layers(vllm_config: VllmConfig) -> list[LayerSpec]:
    """On the root, once the model is loaded."""
    return [
        LayerSpec(
            name=name,
            args=layer.impl.token_parallel_args[0],
            kwargs={k: _to_host(v) for k, v in layer.impl.token_parallel_args[1].items()},
            head_size_v=layer.head_size_v,
            scales={s: _to_host(getattr(layer, s)) for s in _SCALES if hasattr(layer, s)},
            host_scales={s: getattr(layer, s) for s in _HOST_SCALES if hasattr(layer, s)},
        )
        for name, layer in attention_layers(vllm_config).items()
    ]


def make_layers(vllm_config: VllmConfig, specs: Sequence[LayerSpec], device: torch.device) -> None:
    """On a KV worker: makes the layers and registers them in `vllm_config` under the names that they have on the
    root."""
    cache_config = copy.copy(vllm_config.cache_config)
    # The specs hold the outcome of these model-wide settings, layer by layer.
    cache_config.sliding_window = None
    cache_config.kv_cache_dtype_skip_layers = []
    dtype = vllm_config.model_config.dtype
    with set_current_vllm_config(vllm_config), set_default_torch_dtype(dtype), torch.device(device):
        for spec in specs:
            _make_layer(spec, cache_config, device, dtype)


def _make_layer(spec: LayerSpec, cache_config: Any, device: torch.device, dtype: torch.dtype) -> None:
    heads, head_size, scale, kv_heads, alibi, window, cache_dtype, soft_cap, attn_type, shared_with = spec.args
    cache_config.cache_dtype = cache_dtype
    layer = Attention(
        heads,
        head_size,
        scale,
        num_kv_heads=kv_heads,
        alibi_slopes=alibi,
        cache_config=cache_config,
        logits_soft_cap=soft_cap,
        per_layer_sliding_window=window,
        prefix=spec.name,
        attn_type=attn_type,
        kv_sharing_target_layer_name=shared_with,
        head_size_v=spec.head_size_v,
        **{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in spec.kwargs.items()},
    )
    layer.impl.process_weights_after_loading(dtype)
    for name, value in spec.scales.items():
        layer.register_buffer(name, value.to(device))
    for name, value in spec.host_scales.items():
        setattr(layer, name, value)


def parameter_bytes(layers: Sequence[Any]) -> int:
    """Bytes of parameters and buffers that bare layers hold: their attention scales, and sinks."""
    tensors = [t for layer in layers for t in (*layer.parameters(), *layer.buffers())]
    sinks = [layer.impl.sinks for layer in layers if getattr(layer.impl, "sinks", None) is not None]
    return sum(t.nbytes for t in (*tensors, *sinks))


def _to_host(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) else value
