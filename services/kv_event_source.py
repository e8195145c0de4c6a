"""Where an engine publishes what its KV cache holds."""

from __future__ import annotations

from typing import Any


def kv_event_source(vllm_config: Any) -> dict[str, Any] | None:
    """The answer of `GET /kv_events`, None if the engine publishes nothing.

    From vLLM's --kv-events-config (vllm/config/kv_events.py). `block_size` is in tokens, and the smallest unit that
    an event speaks of.
    """
    config = vllm_config.kv_events_config
    if config is None or not config.enable_kv_cache_events or config.publisher != "zmq":
        return None
    return {
        "endpoint": config.endpoint,
        "replay_endpoint": config.replay_endpoint,
        "topic": config.topic,
        "block_size": vllm_config.cache_config.block_size,
    }
