"""The next turn of a conversation (`--pull-back-tokens`): the prefill engine pulls what a decode engine has of the
prompt, the last answer above all, and computes the rest.

The decode engine is sent the beginning that it has cached and one token more, as a prefill engine would be: it computes
that token in a step with others' and keeps the KV cache under a lease, which the prefill engine's pull ends. Where any
of it goes wrong the prefill engine computes the whole prompt.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client import CollectorRegistry, Counter

from router.errors import EngineFailure, EngineRejected
from router.fit import misfit
from router.kv_roles import kv_roles
from router.leases import Lease
from router.legs import kept_body, kv_params
from router.types import Api, Role
from router.upstream import EngineFailures, post_to

if TYPE_CHECKING:
    from collections.abc import Sequence

    import aiohttp

    from router.demand import Demand
    from router.engines import Engine, EnginePool
    from router.hosts import EngineHosts
    from router.leases import LeaseReleaser
    from router.settings import RouterSettings
    from router.types import GenerationRequest, JsonObject

logger = logging.getLogger(__name__)

PATIENCE = 2.0  # s; a step with many others, and no more: a client is waiting
REST = 10.0  # s for which two engines between which it came to nothing are left alone


class Found(NamedTuple):
    """An engine, and how many tokens of a prompt's beginning it has cached."""

    engine: Engine
    num_cached: int


class Kept(NamedTuple):
    """A prompt's beginning, and the decode engine that keeps it under this lease."""

    engine: Engine
    lease: Lease


class PullBackEnd(StrEnum):
    """What became of a request to keep a prompt's beginning. The values are labels of a metric."""

    KEPT = "kept"
    NOT_KEPT = "not_kept"  # the engine was busy with too many others, or not able to
    FAILED = "failed"  # no answer, or not in time


class PullBack:
    def __init__(
        self,
        pool: EnginePool,
        session: aiohttp.ClientSession,
        settings: RouterSettings,
        hosts: EngineHosts,
        releaser: LeaseReleaser,
        registry: CollectorRegistry,
    ) -> None:
        self._pool = pool
        self._session = session
        self._hosts = hosts
        self._releaser = releaser
        self._threshold = settings.pull_back_tokens
        self._interval = settings.health_check_interval
        self._able: set[Engine] = set()  # that keep KV cache for others and pull it
        self._failed: dict[tuple[Engine, Engine], float] = {}  # when; by prefill and decode engine
        ends = Counter(
            "tknp_pull_backs",
            "Prompts whose beginning a decode engine was asked to keep for a prefill engine, by what became of it.",
            ["end"],
            registry=registry,
        )
        self._ends = {end: ends.labels(end) for end in PullBackEnd}

    async def run(self) -> None:
        """Learns which engines are able to. Never ends, unless it is off."""
        asked: set[Engine] = set()
        while self._threshold:
            up = {engine for engine in self._pool.engines if engine.is_up}
            asked &= up
            self._able &= up
            self._failed = {pair: at for pair, at in self._failed.items() if up.issuperset(pair)}
            for engine in up - asked:
                if (roles := await kv_roles(self._session, engine)) is not None:
                    asked.add(engine)
                    if roles >= set(Role):
                        self._able.add(engine)
            await asyncio.sleep(self._interval)

    async def keep(self, prefill: Engine, request: GenerationRequest) -> Kept | None:
        """The beginning of the request's prompt, kept by a decode engine for the prefill engine; None if that is not
        worth it, or could not be had."""
        if not self._threshold or prefill not in self._able:
            return None
        decode = [e for e in self._pool.alive(Role.DECODE, request.model) if self._fits(prefill, e)]
        found = longest(decode, request.demand)
        if found is None or found.num_cached - prefill.load.num_cached_tokens(request.demand) < self._threshold:
            return None
        engine = found.engine
        lease = Lease(request.id, engine.endpoint)
        has_answered = False
        try:
            lease.params = await self._ask(found, request, lease.id)
            has_answered = True
        except (EngineFailure, EngineRejected) as error:
            logger.warning("%s kept nothing of request %s: %r", engine.endpoint.name, request.id, error)
        finally:
            if not has_answered:  # also where the client hung up
                self._releaser.release(lease, None)
        if lease.params is None:
            self._ends[PullBackEnd.NOT_KEPT if has_answered else PullBackEnd.FAILED].inc()
            self.fail(prefill, engine)
            return None
        self._ends[PullBackEnd.KEPT].inc()
        lease.readers.append(prefill.endpoint)
        return Kept(engine, lease)

    def fail(self, prefill: Engine, decode: Engine) -> None:
        """It came to nothing between these two, as it would in the next moment."""
        self._failed[prefill, decode] = time.monotonic()

    def _fits(self, prefill: Engine, decode: Engine) -> bool:
        """Whether the prefill engine can read what the decode engine keeps, and both say what they have cached."""
        here, there = prefill.load.events, decode.load.events
        has_rested = time.monotonic() - self._failed.get((prefill, decode), -math.inf) > REST
        is_alike = here is not None and there is not None and here.block_size == there.block_size
        return decode in self._able and has_rested and is_alike and misfit(decode, prefill) is None

    async def _ask(self, found: Found, request: GenerationRequest, lease_id: str) -> JsonObject | None:
        engine, token_ids = found.engine, request.demand.token_ids
        assert token_ids is not None
        body = kept_body(request.model, list(token_ids[: found.num_cached + 1]), lease_id)
        with EngineFailures(engine.endpoint):
            async with asyncio.timeout(PATIENCE):
                response = await post_to(
                    self._session, engine.endpoint, Api.COMPLETIONS, f"{request.id}-kept", body, request.trace_headers
                )
                async with response:
                    params = kv_params(engine.endpoint, await response.read())
        if params is not None:
            await self._hosts.check(engine.endpoint, params)
        return params


def longest(decode: Sequence[Engine], demand: Demand) -> Found | None:
    """The decode engine that has most of the prompt; None if none is known to have any: a guess by the text is not
    enough, since the engine would compute what it lacks."""
    token_ids = demand.token_ids
    known = [
        Found(engine, engine.load.num_cached_tokens(demand)) for engine in decode if engine.load.events is not None
    ]
    if token_ids is None or not known:
        return None
    best = max(known, key=lambda found: found.num_cached)
    # Of all of it there is nothing to compute but the last token, which the decode engine does as well.
    return best if best.num_cached < len(token_ids) else None
