"""Gives back KV cache that a prefill engine keeps for an attempt that came to nothing.

Without this it is held until vLLM's lease runs out, 30 s by default. Order matters: while a decode engine may still
read the blocks they must stay what they are, so it drops the request first.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import quote

import aiohttp
from yarl import URL

from router.legs import release_body
from router.types import Api, LeaseEnd

if TYPE_CHECKING:
    from router.metrics import RouterMetrics
    from router.types import Endpoint, JsonObject

logger = logging.getLogger(__name__)

RELEASE_TIMEOUT = 10.0  # s; after that the lease's end is near anyway
SETTLE_SECONDS = 0.05  # for the decode engine's server to notice that the connection of the request has gone


@dataclass(slots=True)
class Lease:
    """KV cache of one prefill leg, from the moment that leg is sent."""

    request_id: str
    prefill: Endpoint
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    params: JsonObject | None = None  # where the cache is; None until the prefill engine has answered
    readers: list[Endpoint] = field(default_factory=list)  # decode engines that may have been told


class LeaseReleaser:
    """Releases leases in the background."""

    def __init__(self, session: aiohttp.ClientSession, metrics: RouterMetrics) -> None:
        self._session = session
        self._metrics = metrics
        self._tasks: set[asyncio.Task[None]] = set()

    def release(self, lease: Lease, helper: Endpoint | None) -> asyncio.Task[None]:
        """The caller has closed its connections to all engines of the attempt. Returns what may be waited for.

        A stock vLLM prefill engine listens to decode engines only: then one that refuses a request tells it. That is
        `helper`, any decode engine alive.
        """
        task = asyncio.create_task(self._release(lease, helper))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Waits for what is under way; each of it is bounded by RELEASE_TIMEOUT."""
        await asyncio.gather(*self._tasks)

    async def _release(self, lease: Lease, helper: Endpoint | None) -> None:
        try:
            async with asyncio.timeout(RELEASE_TIMEOUT):
                end = await self._try_release(lease, helper)
        except (aiohttp.ClientError, OSError) as error:
            end = LeaseEnd.EXPIRES
            logger.warning(
                "the KV cache of request %s stays on %s until its lease ends: %r",
                lease.request_id,
                lease.prefill.name,
                error,
            )
        self._metrics.lease_ended(end)

    async def _try_release(self, lease: Lease, helper: Endpoint | None) -> LeaseEnd:
        for reader in lease.readers:
            await asyncio.sleep(SETTLE_SECONDS)
            await self._make_drop(reader, lease.request_id)
        status = await self._post(lease.prefill, f"/kv_leases/{lease.id}/release")
        if status < 300:
            return LeaseEnd.RELEASED
        if lease.params is None or helper is None:
            return LeaseEnd.EXPIRES
        async with self._session.post(
            helper.url + Api.COMPLETIONS,
            data=release_body(lease.params),
            headers={"Content-Type": "application/json"},
            allow_redirects=False,
        ) as response:
            await response.read()
        return LeaseEnd.RELEASED

    async def _make_drop(self, reader: Endpoint, request_id: str) -> None:
        """An engine that refuses the connection has died, and reads nothing any more."""
        try:
            await self._post(reader, f"/requests/{quote(request_id, safe='')}/abort")
        except aiohttp.ClientConnectorError:
            logger.info("%s is gone; request %s needs no abort there", reader.name, request_id)

    async def _post(self, endpoint: Endpoint, path: str) -> int:
        async with self._session.post(URL(endpoint.url + path, encoded=True), allow_redirects=False) as response:
            await response.read()
            return response.status
