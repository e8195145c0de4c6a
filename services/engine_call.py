"""Calls to an engine core from a handler of its server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import HTTPException

CALL_SECONDS = 10.0
"""More than any step takes that somebody would wait for."""

T = TypeVar("T")


async def answered(call: Awaitable[T]) -> T:
    """The engine core's answer.

    Raises HTTPException if there is none in time. vLLM 0.32.0 leaves callers of a core that dies waiting, and its
    server waits for its handlers before it ends: without a limit a dead engine's process would stay.
    """
    try:
        async with asyncio.timeout(CALL_SECONDS):
            return await call
    except TimeoutError as error:
        raise HTTPException(
            503, f"the engine did not answer within {CALL_SECONDS:.0f} s; it is busy or dead"
        ) from error
