"""What the executor and the scheduler of one engine core, made apart by vLLM, have to know of one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kv_transfer.connector import TokenParallelKVConnector
    from services.decode.token_parallel.kv_cache_manager import PartitionedKVCacheManager


@dataclass(frozen=True)
class EngineState:
    """The scheduler's side of the engine: its block pools and, where KV is pulled, its half of the connector."""

    kv_cache_manager: PartitionedKVCacheManager
    connector: TokenParallelKVConnector | None


_state: EngineState | None = None


def set_engine_state(state: EngineState) -> None:
    """Called by the scheduler."""
    global _state
    _state = state


def get_engine_state() -> EngineState | None:
    """The state of this process's engine core; None before the scheduler exists."""
    return _state
