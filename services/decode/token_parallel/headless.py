"""The part of a decode engine on every host but the first: its ranks, without an engine core and a server."""

from __future__ import annotations

import signal
from typing import Any

from services.decode.token_parallel.executor import TokenParallelExecutor
from services.vllm_server import EngineDiedError


def run_ranks(args: Any) -> None:
    """vLLM's `run_headless` (entrypoints/cli/serve.py) for our executor: returns when host 0 has ended the engine.

    Args:
        args: vLLM's parsed server options, the same as on host 0.

    Raises:
        EngineDiedError: a rank of this host has died, or another host is gone.
    """
    from vllm import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    def stop(*_: Any) -> None:
        raise SystemExit

    signal.signal(signal.SIGTERM, stop)
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config(UsageContext.OPENAI_API_SERVER, headless=True)
    executor = TokenParallelExecutor(config, monitor_workers=False)
    executor.start_worker_monitor(inline=True)
    if executor.is_failed:
        raise EngineDiedError("this host's part of the engine has died; the reason stands above")
