"""Runs a request for as long as its client is there.

uvicorn does not tell a plain ASGI application that its client hung up: what is sent then goes nowhere, without an
error. So a watcher waits for the news and cancels the request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import Receive


async def run_until_hang_up(work: Coroutine[Any, Any, None], receive: Receive) -> bool:
    """True if the work ended, False if it was cancelled because the client hung up. The body must have been read."""
    task = asyncio.current_task()
    assert task is not None
    watcher = asyncio.create_task(_cancel_on_hang_up(receive, task))
    try:
        await work
    except asyncio.CancelledError:
        if not watcher.done():
            raise  # somebody else's: the server shuts down
        task.uncancel()
        return False
    finally:
        watcher.cancel()
    return True


async def _cancel_on_hang_up(receive: Receive, task: asyncio.Task[Any]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    task.cancel()
