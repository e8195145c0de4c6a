"""NIXL's agent with a progress thread that rests.

NIXL serves its peers, and moves what is under way, in a thread that polls without pause, one core per worker. The
library can make it wait for events instead, for a bounded time, but its Python API sets that time to 0."""

from __future__ import annotations

import sys
import threading
import uuid
from typing import Any

from vllm.distributed.nixl_utils import NixlWrapper, nixl_agent_config

_making = threading.Lock()


def make_agent(backends: list[str], num_threads: int, rest_microseconds: int) -> Any:
    """An agent whose progress thread waits so long for an event before it looks again.

    Args:
        backends, num_threads: see nixl_agent_config.
        rest_microseconds: 0 polls without pause, as NIXL's own.
    """
    bindings = sys.modules[NixlWrapper.__module__].nixlBind
    plain = bindings.nixlAgentConfig

    class Resting(plain):  # type: ignore[misc, valid-type]
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, rest_microseconds if name == "pthrDelay" else value)

    config = nixl_agent_config(
        enable_prog_thread=True, num_threads=num_threads, backends=backends, capture_telemetry=True
    )
    with _making:
        bindings.nixlAgentConfig = Resting
        try:
            return NixlWrapper(str(uuid.uuid4()), config)
        finally:
            bindings.nixlAgentConfig = plain
