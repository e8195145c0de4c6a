"""`services.decode.token_parallel.backends.<NAME>` is vLLM's attention backend of that name, wrapped when needed.

vLLM resolves an overridden backend by this path, in every process and for every engine
(v1/attention/backends/registry.py, register_backend). Only where the engine that is being built is token-parallel is
the answer a wrapper; elsewhere it is vLLM's own class, untouched.
"""

from __future__ import annotations

from typing import Any

from services.decode.token_parallel.options import TokenParallelOptions

WRAPPED = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")
"""Names in vLLM's AttentionBackendEnum that token parallelism covers."""

_wrappers: dict[str, type[Any]] = {}


def __getattr__(name: str) -> type[Any]:
    if name not in WRAPPED:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from vllm.config import get_current_vllm_config_or_none
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    inner: type[Any] = resolve_obj_by_qualname(AttentionBackendEnum[name].value)
    config = get_current_vllm_config_or_none()
    if config is None or TokenParallelOptions.of(config).size == 1:
        return inner
    if name not in _wrappers:
        from services.decode.token_parallel.attention import wrap_backend

        _wrappers[name] = wrap_backend(inner, module=__name__)
    return _wrappers[name]
