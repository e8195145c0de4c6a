"""Calls to an engine core from a handler of its server."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import HTTPException

CALL_SECONDS = 10.0
"""More than any step takes that somebody would wait for."""

LOOK_SECONDS = 0.5
"""Between two looks whether the engine is still there."""

T = TypeVar("T")


async def answered(engine: Any, call: Coroutine[Any, Any, T]) -> T:
    """The engine core's answer. `engine` is vLLM's EngineClient.

    Raises HTTPException if the engine has died, or gives none in time. vLLM 0.32.0 leaves callers of a core that dies
    waiting, and its server waits for its handlers before it ends: a dead engine's process would stay.
    """
    task = asyncio.ensure_future(call)
    try:
        async with asyncio.timeout(CALL_SECONDS):
            while not (await asyncio.wait((task,), timeout=LOOK_SECONDS))[0]:
                if engine.errored:
                    raise HTTPException(503, "the engine has died")
            return await task
    except TimeoutError as error:
        raise HTTPException(503, f"the engine did not answer within {CALL_SECONDS:.0f} s; it is busy") from error
    finally:
        task.cancel()
