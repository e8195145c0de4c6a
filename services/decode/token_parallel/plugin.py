"""Entry point `vllm.general_plugins`: vLLM calls `register` once in every process of an engine."""

from __future__ import annotations

from services.decode.token_parallel import backends


def register() -> None:
    """Makes vLLM look its attention backends up through `backends`, which leaves them alone unless token parallelism
    is on."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for name in backends.WRAPPED:
        member = AttentionBackendEnum[name]
        if not member.is_overridden():
            register_backend(member, f"{backends.__name__}.{name}")
