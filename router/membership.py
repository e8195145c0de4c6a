"""Who is in the pool: makes it what discovery found, less what was flipped, without dropping a request.

    found and up -> takes requests
    not found any more, or to have the other role -> gets no new request -> has nothing left to do -> out of the pool

An engine joins in its new role only after it has left in the old one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from router.lifetime import Moment
from router.types import Endpoint, Role

if TYPE_CHECKING:
    from collections.abc import Iterable

    from router.engines import Engine, EnginePool
    from router.hosts import EngineHosts
    from router.metrics import RouterMetrics
    from router.records import RecordStore

logger = logging.getLogger(__name__)

LOOK_INTERVAL = 0.1  # s between two looks at engines that have something left to do
FORGET_SECONDS = 300.0  # until a gone engine's counters go too: Prometheus has read their last values by then

# A prefill engine keeps a request's KV cache from its answer until the decode engine has pulled it.
KEEPING = {Moment.PREFILL_DONE, Moment.DECODE_SENT}


class Membership:
    def __init__(self, pool: EnginePool, records: RecordStore, hosts: EngineHosts, metrics: RouterMetrics) -> None:
        self._pool = pool
        self._records = records
        self._hosts = hosts
        self._metrics = metrics
        self._found = {engine.endpoint for engine in pool.engines}
        self._flipped: dict[str, Role] = {}  # URL -> the role that it was given
        self._woken = asyncio.Event()

    def found(self, endpoints: Iterable[Endpoint]) -> None:
        """These are all engines that there should be."""
        self._found = set(endpoints)
        self._flipped = {url: role for url, role in self._flipped.items() if url in {e.url for e in self._found}}
        self._woken.set()

    def flip(self, engine: Engine) -> None:
        """From now on it is to have the other role, until it is found no more."""
        self._flipped[engine.endpoint.url] = engine.endpoint.role.other
        self._woken.set()

    def is_settled(self) -> bool:
        """Whether the pool is what it should be: nobody is on the way out."""
        return not self._woken.is_set() and not any(engine.is_leaving for engine in self._pool.engines)

    async def run(self) -> None:
        """Never ends."""
        while True:
            self._reconcile()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if self.is_settled() else LOOK_INTERVAL):
                    await self._woken.wait()
            self._woken.clear()

    def _reconcile(self) -> None:
        pool, before = self._pool, self._pool.engines
        wanted = {Endpoint(self._flipped.get(e.url, e.role), e.url) for e in self._found}
        for engine in pool.engines:
            is_leaving = engine.endpoint not in wanted
            if is_leaving != engine.is_leaving:
                engine.is_leaving = is_leaving
                does = "leaves; it ends its requests" if is_leaving else "is back"
                logger.info("%s engine %s %s", engine.endpoint.role, engine.endpoint.name, does)
        for engine in [engine for engine in pool.engines if engine.is_leaving and self._is_done(engine)]:
            self._remove(engine)
        held = {engine.endpoint.url for engine in pool.engines if engine.is_leaving}
        new = wanted - {engine.endpoint for engine in pool.engines}
        for endpoint in sorted(new, key=lambda e: (e.role is Role.DECODE, e.url)):
            if endpoint.url not in held:
                pool.add(endpoint)
                logger.info("%s engine %s joins", endpoint.role, endpoint.name)
        if pool.engines is not before:
            self._hosts.follow(engine.endpoint for engine in pool.engines)

    def _is_done(self, engine: Engine) -> bool:
        """Whether it has nothing of this router's left, KV cache that is to be pulled included."""
        if engine.num_outstanding:
            return False
        return engine.endpoint.role is Role.DECODE or not any(
            record.last in KEEPING and record.engine(Role.PREFILL) == engine.endpoint
            for record in self._records.in_flight()
        )

    def _remove(self, engine: Engine) -> None:
        self._pool.remove(engine)
        logger.info("%s engine %s has left", engine.endpoint.role, engine.endpoint.name)
        asyncio.get_running_loop().call_later(FORGET_SECONDS, self._forget, engine.endpoint)

    def _forget(self, endpoint: Endpoint) -> None:
        if all(engine.endpoint != endpoint for engine in self._pool.engines):
            self._metrics.engine_left(endpoint)
