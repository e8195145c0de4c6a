"""Tells each decode engine of each prefill engine as soon as both are up, so that they connect before the first request
between them (services/kv_peers.py). A stock engine knows nothing of it and connects at that request.

What a prefill engine says of itself is kept: with it a decode engine can be sent a request before the prefill engine
has answered (router.streaming)."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import aiohttp
import orjson

from router.errors import EngineFailure
from router.fit import misfit
from router.types import Role

if TYPE_CHECKING:
    from router.engines import Engine, EnginePool
    from router.hosts import EngineHosts
    from router.settings import RouterSettings
    from router.types import JsonObject

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.2  # s between two looks who is new; they cost microseconds


class Introductions:
    """Who has been told of whom."""

    def __init__(
        self, pool: EnginePool, session: aiohttp.ClientSession, settings: RouterSettings, hosts: EngineHosts
    ) -> None:
        self._pool = pool
        self._session = session
        self._hosts = hosts
        # A first request may come as soon as an engine is up.
        self._interval = min(settings.health_check_interval, LOOK_SECONDS)
        self._timeout = settings.health_check_timeout
        self._told: set[tuple[Engine, Engine]] = set()
        self._peers: dict[tuple[Engine, Engine], JsonObject] = {}

    def peer(self, prefill: Engine, decode: Engine) -> JsonObject | None:
        """What the prefill engine says of itself, if the decode engine has been told so; services.kv_peers.KVPeer."""
        return self._peers.get((prefill, decode))

    async def run(self) -> None:
        """Never ends."""
        while True:
            pairs = {
                (prefill, decode)
                for prefill in self._pool.of(Role.PREFILL)
                for decode in self._pool.of(Role.DECODE)
                if prefill.is_up and decode.is_up
                if (prefill, decode) in self._told or not misfit(prefill, decode)
            }
            # An engine that was down may be another one now.
            self._told &= pairs
            self._peers = {pair: peer for pair, peer in self._peers.items() if pair in pairs}
            new = pairs - self._told
            await asyncio.gather(*(self._introduce(prefill, decode) for prefill, decode in new))
            self._told |= new
            await asyncio.sleep(self._interval)

    async def _introduce(self, prefill: Engine, decode: Engine) -> None:
        """Once: where it fails, the engines connect when the first request comes."""
        try:
            async with asyncio.timeout(self._timeout):
                async with self._session.get(f"{prefill.endpoint.url}/kv_peer", allow_redirects=False) as response:
                    peer = await response.read()
                    status = response.status
                if status == 200:
                    # As with what it answers to requests: it must not make others connect to anywhere.
                    await self._hosts.check(prefill.endpoint, {"remote_host": orjson.loads(peer)["host"]})
                    headers = {"Content-Type": "application/json"}
                    url = f"{decode.endpoint.url}/kv_peers"
                    async with self._session.post(url, data=peer, headers=headers, allow_redirects=False) as response:
                        await response.read()
                        status = response.status
                    if status == 202:
                        self._peers[prefill, decode] = orjson.loads(peer)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError, EngineFailure) as error:
            logger.warning("%s was not told of %s: %r", decode.endpoint.name, prefill.endpoint.name, error)
            return
        if status not in (202, 404):
            logger.warning("%s was not told of %s: status %d", decode.endpoint.name, prefill.endpoint.name, status)
