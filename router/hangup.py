"""Runs a request for as long as its client is there.

uvicorn does not tell a plain ASGI application that its client hung up, unless a task waits for the news in `receive`:
what is sent then goes nowhere, without an error. So the connection itself says so, which costs no task.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from router.outlet import Outlet
    from router.reply import Reply


async def run_until_hang_up(work: Coroutine[Any, Any, None], outlet: Outlet, reply: Reply) -> bool:
    """True if the work ended, False if it was cancelled because the client hung up before it had its whole answer. The
    body must have been read."""
    task = asyncio.current_task()
    assert task is not None

    def on_lost() -> None:
        if not reply.is_complete:
            task.cancel()

    outlet.tell(on_lost)
    try:
        await work
    except asyncio.CancelledError:
        if not outlet.is_lost:
            raise  # somebody else's: the server shuts down
        task.uncancel()
        return False
    finally:
        outlet.forget(on_lost)
    return True
