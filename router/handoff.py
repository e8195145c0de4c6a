"""The hand-off of one request: prefill leg, decode leg, and another engine for either while the client got nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from router.errors import ClientStalled, EngineFailure, FailureKind, RouterError
from router.legs import decode_body, kv_params, prefill_body
from router.lifetime import Attempt, Moment
from router.relay import StreamRelay, relay_whole
from router.types import LocalPrefill, Outcome, Role
from router.upstream import engine_failures, post

if TYPE_CHECKING:
    from router.engine_client import EngineClient
    from router.engines import Engine, EnginePool
    from router.leases import LeaseReleaser
    from router.lifetime import RequestRecord
    from router.metrics import RouterMetrics
    from router.reply import Reply
    from router.settings import RouterSettings
    from router.types import Endpoint, GenerationRequest, JsonObject


@dataclass(frozen=True, slots=True)
class Fleet:
    """What every hand-off shares."""

    settings: RouterSettings
    client: EngineClient
    pool: EnginePool
    metrics: RouterMetrics
    releaser: LeaseReleaser


class Handoff:
    """One request's way through the engines."""

    def __init__(self, fleet: Fleet, request: GenerationRequest, record: RequestRecord, reply: Reply) -> None:
        self._fleet = fleet
        self._request = request
        self._record = record
        self._reply = reply
        self._local_prefill = request.local_prefill
        self._held: JsonObject | None = None  # KV cache that a prefill engine keeps and no decode engine was told of
        self._prefilled_by: Engine | None = None
        self._tried: set[Endpoint] = set()

    async def run(self) -> None:
        """Answers the client. Raises RouterError when it can't; what was sent until then stands in the reply."""
        roles = (Role.DECODE,) if self._local_prefill else (Role.PREFILL, Role.DECODE)
        self._fleet.pool.require(self._request.model, roles)
        try:
            await self._run_with_retries()
        finally:
            if self._held is not None:
                self._fleet.releaser.release(self._held, self._request.model)

    async def _run_with_retries(self) -> None:
        for num_left in reversed(range(1 + self._fleet.settings.num_retries)):
            try:
                await self._attempt()
            except EngineFailure as failure:
                # A connection that was accepted too late says more about the load than about this engine.
                if failure.kind is not FailureKind.CONNECT_TIMEOUT:
                    self._tried.add(failure.endpoint)
                if self._reply.started or not num_left or not self._can_retry(failure):
                    raise
                self._fleet.metrics.retried(failure.endpoint.role)
            else:
                return

    def _can_retry(self, failure: EngineFailure) -> bool:
        """Whether an engine is left that was not tried. Raises NoEngine if that one was the last alive."""
        role = failure.endpoint.role
        return self._fleet.pool.choose(role, self._request, self._tried, self._prefilled_by) is not None

    async def _attempt(self) -> None:
        if self._local_prefill is None and self._held is None:
            await self._prefill(self._choose(Role.PREFILL))
        await self._decode(self._choose(Role.DECODE))

    def _choose(self, role: Role) -> Engine:
        engine = self._fleet.pool.choose(role, self._request, self._tried, self._prefilled_by)
        if engine is None:  # every one alive failed this request: the last chance is worth more than a certain error
            engine = self._fleet.pool.choose(role, self._request, (), self._prefilled_by)
        assert engine is not None
        return engine

    async def _prefill(self, engine: Engine) -> None:
        endpoint = engine.endpoint
        body = prefill_body(self._request)
        with self._leg(engine), engine_failures(endpoint):
            async with asyncio.timeout(self._fleet.settings.prefill_timeout):
                self._record.mark(Moment.PREFILL_SENT)
                response = await post(self._fleet.client, endpoint, self._request, body)
                async with response:
                    answer = await response.read()
            try:
                self._held = kv_params(answer)
            except ValueError as error:
                raise EngineFailure(endpoint, FailureKind.GARBAGE, "its answer is not a JSON object") from error
            self._record.mark(Moment.PREFILL_DONE)
        self._prefilled_by = engine
        if self._held is None:
            self._local_prefill = self._record.local_prefill = LocalPrefill.NO_KV

    async def _decode(self, engine: Engine) -> None:
        params, self._held = self._held, None
        body = decode_body(self._request, params)
        try:
            with self._leg(engine), engine_failures(engine.endpoint):
                await self._relay(engine.endpoint, body)
        except EngineFailure as failure:
            # Once a decode engine may have read the cache it may also have freed it: only one that was never
            # reached leaves it for the next. Otherwise the next attempt prefills again.
            if not failure.reached_engine:
                self._held = params
            raise

    async def _relay(self, endpoint: Endpoint, body: bytes) -> None:
        settings = self._fleet.settings
        stream = self._request.stream
        try:
            async with asyncio.timeout(
                settings.first_token_timeout if stream else settings.generation_timeout
            ) as limit:
                self._record.mark(Moment.DECODE_SENT)
                response = await post(self._fleet.client, endpoint, self._request, body)
                try:
                    if not stream:
                        await relay_whole(response, endpoint, self._reply, self._record)
                        return
                    relay = StreamRelay(endpoint, self._reply, self._record, self._fleet.metrics.observe_gap)
                    await relay.run(response, limit, settings.between_chunks_timeout)
                finally:
                    response.close()  # does nothing once the answer was read to its end; before, it aborts the request
        except TimeoutError as error:
            if self._reply.is_sending:
                raise ClientStalled("The client stopped reading the stream.") from error
            raise
        await self._reply.end_stream()

    @contextmanager
    def _leg(self, engine: Engine) -> Iterator[None]:
        """Counts one leg on one engine and says how it ended, however that is."""
        attempt = Attempt(engine.endpoint)
        self._record.attempts.append(attempt)
        outcome = Outcome.FAILED
        try:
            with engine.occupied():
                yield
            outcome = Outcome.OK
        except asyncio.CancelledError:
            outcome = Outcome.CANCELLED
            raise
        except EngineFailure as failure:
            outcome = failure.outcome
            engine.suspect(failure)
            raise
        except RouterError as error:
            outcome = error.outcome
            raise
        finally:
            attempt.outcome = outcome
            self._fleet.metrics.leg_ended(engine, outcome)
