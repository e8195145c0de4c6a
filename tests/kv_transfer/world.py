"""What vLLM wants around an engine that is not one of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm.config import set_current_vllm_config
from vllm.distributed.parallel_state import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)


@contextmanager
def world(config: Any, directory: Path) -> Iterator[None]:
    """vLLM's process groups, with this process alone in them."""
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{directory / 'store'}", 0, "gloo")
        initialize_model_parallel(1, 1)
        try:
            yield
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()


@contextmanager
def vllm_log(handler: logging.Handler) -> Iterator[None]:
    """`handler` gets what vLLM's loggers, which hand nothing on, warn of meanwhile."""
    vllm = logging.getLogger("vllm")
    vllm.addHandler(handler)
    before = vllm.level
    vllm.setLevel(logging.WARNING)  # by its method: loggers remember what is enabled
    try:
        yield
    finally:
        vllm.removeHandler(handler)
        vllm.setLevel(before)
