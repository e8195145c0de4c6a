"""Gives back KV cache that a prefill engine keeps for a request whose decode leg was never sent.

Without this it is held until the lease runs out, 30 s by default.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import aiohttp

from router.legs import release_body
from router.types import Api, Role

if TYPE_CHECKING:
    from router.engines import EnginePool
    from router.types import JsonObject

logger = logging.getLogger(__name__)

RELEASE_TIMEOUT = 10.0  # s; after that the lease's end is near anyway


class LeaseReleaser:
    def __init__(self, session: aiohttp.ClientSession, pool: EnginePool) -> None:
        self._session = session
        self._pool = pool
        self._tasks: set[asyncio.Task[None]] = set()

    def release(self, params: JsonObject, model: str) -> None:
        """In the background, through any decode engine alive: the prefill side takes notice only from one of those."""
        engines = self._pool.alive(Role.DECODE, model)
        if not engines:
            return
        task = asyncio.create_task(self._send(engines[0].endpoint.url, params))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send(self, url: str, params: JsonObject) -> None:
        headers = {"Content-Type": "application/json"}
        try:
            async with asyncio.timeout(RELEASE_TIMEOUT):
                async with self._session.post(
                    url + Api.COMPLETIONS, data=release_body(params), headers=headers
                ) as response:
                    await response.read()
        except (aiohttp.ClientError, OSError) as error:
            logger.warning("KV cache stays leased on the prefill engine until it expires: %s", error)

    async def close(self) -> None:
        """Waits for what is under way; each of it is bounded by RELEASE_TIMEOUT."""
        await asyncio.gather(*self._tasks)
