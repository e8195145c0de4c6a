"""The hand-off of one request: prefill leg, decode leg, and another engine for either when one fails."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from router.cached_usage import CachedUsage
from router.continuation import Transcript
from router.demand import given_token_ids
from router.errors import ClientStalled, EngineFailure, EngineRejected, FailureKind, RouterError
from router.leases import Lease
from router.legs import PULLED_BACK, decode_body, kv_params, num_cached, prefill_body
from router.lifetime import Attempt, Moment
from router.prompt import prompt_fields
from router.relay import StreamRelay, relay_whole
from router.responses import ResponsesRelay
from router.retries import backoff
from router.stream_fields import CantContinue
from router.streaming import run_both, stream_params
from router.token_ids import fetch_text, fetch_token_ids
from router.types import Api, LocalPrefill, NoContinuation, Outcome, Role
from router.upstream import EngineFailures, post

if TYPE_CHECKING:
    import aiohttp

    from router.engines import Engine, EnginePool
    from router.hosts import EngineHosts
    from router.introductions import Introductions
    from router.leases import LeaseReleaser
    from router.lifetime import RequestRecord
    from router.metrics import RouterMetrics
    from router.pull_back import Kept, PullBack
    from router.reply import Reply
    from router.retries import RetryBudget
    from router.settings import RouterSettings
    from router.token_ids import PromptTokenizer
    from router.types import Endpoint, GenerationRequest, JsonObject

logger = logging.getLogger(__name__)

TOKENIZE_TIMEOUT = 10.0  # s; a client is waiting in mid-stream
PATIENCE = 1.0  # s; an engine that takes longer to drop a request hangs, and will hardly get the next attempt


@dataclass(frozen=True, slots=True)
class Fleet:
    """What every hand-off shares."""

    settings: RouterSettings
    session: aiohttp.ClientSession
    pool: EnginePool
    metrics: RouterMetrics
    releaser: LeaseReleaser
    retries: RetryBudget
    tokenizer: PromptTokenizer
    hosts: EngineHosts
    introductions: Introductions
    pull_back: PullBack


class Handoff:
    """One request's way through the engines."""

    def __init__(self, fleet: Fleet, request: GenerationRequest, record: RequestRecord, reply: Reply) -> None:
        self._fleet = fleet
        self._asked = request
        self._request = request  # what is sent: after an engine died in mid-stream, the rest of what was asked
        self._record = record
        self._reply = reply
        self._local_prefill = request.local_prefill
        self._lease: Lease | None = None  # KV cache that a prefill engine may be keeping for this request
        self._kept: Lease | None = None  # and a decode engine for the prefill engine
        self._prefilled_by: Engine | None = None
        self._tried: set[Endpoint] = set()
        self._transcript: Transcript | None = None
        self._no_continuation: CantContinue | None = None  # why there is no transcript of a stream
        if request.stream:
            try:
                if not fleet.settings.continue_streams:
                    raise CantContinue(NoContinuation.SWITCHED_OFF)
                self._transcript = Transcript(request)
            except CantContinue as reason:
                # Its traceback leads back here: a cycle, in which every such request would stay for minutes.
                self._no_continuation = reason.with_traceback(None)

    async def run(self) -> None:
        """Answers the client. Raises RouterError when it can't; what was sent until then stands in the reply."""
        roles = (Role.DECODE,) if self._local_prefill else (Role.PREFILL, Role.DECODE)
        self._fleet.pool.require(self._request.model, roles)
        if self._fleet.pool.chooser.looks_at_prefixes:
            await self._fleet.tokenizer.complete(self._request)
        self._fleet.retries.deposit()
        try:
            await self._run_with_retries()
        finally:
            self._give_back()

    async def _run_with_retries(self) -> None:
        for num_failed in itertools.count(1):
            try:
                await self._attempt()
                return
            except EngineFailure as failure:
                # A connection that was accepted too late says more about the load than about this engine.
                if failure.kind is not FailureKind.CONNECT_TIMEOUT:
                    self._tried.add(failure.endpoint)
                if await self._end_stream():
                    return
                if num_failed > self._fleet.settings.num_retries or not await self._can_go_on(failure):
                    raise
                self._fleet.metrics.retried(failure.endpoint.role)
            await asyncio.sleep(backoff(num_failed))

    async def _can_go_on(self, failure: EngineFailure) -> bool:
        """Whether an engine is left that was not tried, and retries are. Raises NoEngine if that was the last alive."""
        pool, role = self._fleet.pool, failure.endpoint.role
        needs_none = role is Role.PREFILL and pool.local_prefill(self._request) is not None
        is_left = needs_none or pool.choose(role, self._request, self._tried, self._prefilled_by) is not None
        if not is_left and not self._falls_back(failure):
            return False
        if self._reply.started:
            try:
                await self._prepare_continuation()
            except CantContinue as reason:
                failure.broke_stream(str(reason), reason.logged)
                self._fleet.metrics.not_continued(reason.reason)
                return False
        # The requests of an engine that died come once; what an overload slows down would come again and again.
        if failure.is_death or self._fleet.retries.withdraw():
            return True
        self._fleet.metrics.retry_refused()
        return False

    def _falls_back(self, failure: EngineFailure) -> bool:
        """Whether a decode engine is to prefill, because prefill engines failed; not after a timeout, whose prompt
        would only take its time again, in everybody's way."""
        is_quick = failure.endpoint.role is Role.PREFILL and failure.kind is not FailureKind.TIMEOUT
        if not is_quick or not self._fleet.settings.decode_only:
            return False
        self._give_back()
        self._local_prefill = self._record.local_prefill = LocalPrefill.PREFILL_FAILED
        return True

    async def _end_stream(self) -> bool:
        """Whether the client now has a whole stream, because only its end was missing."""
        ending = self._transcript.ending() if self._transcript is not None and self._reply.started else None
        if ending is None:
            return False
        if ending:
            await self._reply.chunk(ending)
        self._record.mark(Moment.LAST_TOKEN)
        await self._reply.end_stream()
        return True

    async def _prepare_continuation(self) -> None:
        """Makes what the client has not got yet the request. Raises CantContinue."""
        if self._transcript is None:
            assert self._no_continuation is not None
            raise self._no_continuation
        engine = self._choose(Role.DECODE)
        session, endpoint, model = self._fleet.session, engine.endpoint, self._asked.model
        try:
            prompt_ids = given_token_ids(prompt_fields(self._asked.api, self._asked.body))
            if prompt_ids is None:
                prompt_ids = await fetch_token_ids(session, endpoint, self._asked, TOKENIZE_TIMEOUT)
        except EngineFailure as error:
            logger.warning("no tokens of the prompt of request %s: %s", self._asked.id, error.logged)
            raise CantContinue(NoContinuation.PROMPT) from error
        card = engine.models[model]

        async def decode(ids: list[int]) -> str:
            return await fetch_text(session, endpoint, model, ids, TOKENIZE_TIMEOUT)

        try:
            rest = await self._transcript.remaining(prompt_ids, card.get("max_model_len", len(prompt_ids)), decode)
        except EngineFailure as error:
            logger.warning("no text of the tokens of request %s: %s", self._asked.id, error.logged)
            raise CantContinue(NoContinuation.TEXT) from error
        self._request = rest
        self._fleet.pool.chooser.describe(rest, rest.demand.session, card)
        self._record.num_continuations += 1
        self._fleet.metrics.continued()

    async def _attempt(self) -> None:
        holds_kv = self._lease is not None and self._lease.params is not None and not self._lease.readers
        if self._local_prefill is None and not holds_kv:
            self._local_prefill = self._record.local_prefill = self._fleet.pool.local_prefill(self._request)
            if self._local_prefill is not None:
                await self._end_attempt_before()
        if self._local_prefill is None and not holds_kv:
            engine = self._choose(Role.PREFILL)
            lease = await self._new_lease(engine)
            if (kept := await self._fleet.pull_back.keep(engine, self._request)) is not None:
                self._kept = kept.lease
                await self._prefill_rest(engine, lease, kept)
                await self._decode(self._choose(Role.DECODE))
                return
            reader = self._reader_of_stream(engine)
            if params := stream_params(self._fleet.introductions.peer(engine, reader), lease.id) if reader else None:
                assert reader is not None
                cached = CachedUsage()
                legs = self._prefill(engine, lease, cached=cached), self._decode(reader, params, cached)
                await run_both(*legs, lambda: self._reply.started)
                return
            await self._prefill(engine, lease)
        await self._decode(self._choose(Role.DECODE))

    def _choose(self, role: Role) -> Engine:
        engine = self._fleet.pool.choose(role, self._request, self._tried, self._prefilled_by)
        if engine is None:  # every one alive failed this request: the last chance is worth more than a certain error
            engine = self._fleet.pool.choose(role, self._request, (), self._prefilled_by)
        assert engine is not None
        return engine

    async def _new_lease(self, engine: Engine) -> Lease:
        await self._end_attempt_before()
        lease = self._lease = Lease(self._request.id, engine.endpoint)
        return lease

    async def _prefill_rest(self, engine: Engine, lease: Lease, kept: Kept) -> None:
        """`kept`: the prompt's beginning, by a decode engine."""
        try:
            await self._prefill(engine, lease, kept=kept.lease.params)
        except EngineFailure as failure:
            if not failure.reached_engine:
                kept.lease.readers.clear()
            raise
        self._kept = None
        if lease.params is None or not lease.params.get(PULLED_BACK):  # else its pull has ended the lease
            kept.lease.readers.clear()
            self._fleet.releaser.release(kept.lease, None)
            self._fleet.pull_back.fail(engine, kept.engine)

    async def _prefill(
        self, engine: Engine, lease: Lease, *, cached: CachedUsage | None = None, kept: JsonObject | None = None
    ) -> None:
        """`cached`: what a decode leg that is under way wants to hear; `kept`: see prefill_body."""
        endpoint = engine.endpoint
        body = prefill_body(self._request, lease.id, is_streamed=cached is not None, kept=kept)
        with self._leg(engine), EngineFailures(endpoint):
            async with asyncio.timeout(self._fleet.settings.prefill_timeout):
                self._mark(Moment.PREFILL_SENT)
                response = await post(self._fleet.session, endpoint, self._request, body, self._record.leg_headers())
                async with response:
                    answer = await response.read()
            params = kv_params(endpoint, answer)
            await self._fleet.hosts.check(endpoint, params)
            lease.params = params
            self._mark(Moment.PREFILL_DONE)
            if cached is not None:
                self._mark(Moment.DECODE_SENT)
                cached.tell(num_cached(params or {}))
        self._prefilled_by = engine
        if self._transcript is not None and lease.params is not None and not self._record.num_continuations:
            self._transcript.num_cached = num_cached(lease.params)
        if lease.params is None:
            self._lease = None
            self._local_prefill = self._record.local_prefill = LocalPrefill.NO_KV
        elif isinstance(num_tokens := lease.params.get("remote_num_tokens"), int) and num_tokens > 0:
            self._fleet.pool.chooser.counted(self._request, num_tokens)

    def _reader_of_stream(self, prefill: Engine) -> Engine | None:
        """The decode engine to begin with beside a prefill engine; None if it is to come after."""
        if not self._fleet.settings.stream_kv or self._request.num_choices > 1:
            return None
        reader = self._fleet.pool.choose(Role.DECODE, self._request, self._tried, prefill)
        # All prompts that are computed now count as if they came to its rank, too. Else one of them might find that
        # this one has taken its room, while its own KV cache takes the room that this one needs to be computed.
        computed = self._fleet.pool.alive(Role.PREFILL, self._request.model)
        num_tokens = self._request.demand.num_prompt_tokens + sum(engine.load.num_tokens for engine in computed)
        spare = self._fleet.settings.stream_kv_spare
        return reader if reader is not None and reader.load.kv.spares(num_tokens, spare) else None

    async def _decode(
        self, engine: Engine, stream: JsonObject | None = None, cached: CachedUsage | None = None
    ) -> None:
        """`stream`: where its KV cache comes from, if the prefill leg is under way, which then tells `cached`."""
        lease, num_chunks = self._lease, self._record.num_chunks
        params = stream or (lease.params if lease else None)
        body = decode_body(self._request, params, with_ids=self._transcript is not None)
        if lease is not None:
            lease.readers.append(engine.endpoint)
        try:
            with self._leg(engine), EngineFailures(engine.endpoint):
                await self._relay(engine, body, cached)
        except EngineFailure as failure:
            # Once a decode engine may have read the cache it may also have freed it: only one that was never
            # reached leaves it for the next. Otherwise the next attempt prefills again.
            if lease is not None and not failure.reached_engine:
                lease.readers.clear()
            raise
        finally:
            if self._record.num_chunks > num_chunks:  # what generates has pulled the cache, and so ended its lease
                self._lease = None

    async def _end_attempt_before(self) -> None:
        """Waits a little for its end: engines know both attempts by one id, and what ends one must not end the next."""
        if released := self._give_back():
            await asyncio.wait(released, timeout=PATIENCE)

    def _give_back(self) -> list[asyncio.Task[None]]:
        """Sees to it that no engine keeps KV cache for this request. Returns what may be waited for."""
        lease, kept = self._lease, self._kept
        self._lease = self._kept = None
        released = [] if kept is None else [self._fleet.releaser.release(kept, None)]
        if lease is not None:
            alive = self._fleet.pool.alive(Role.DECODE, self._request.model)
            released.append(self._fleet.releaser.release(lease, alive[0].endpoint if alive else None))
        return released

    def _mark(self, moment: Moment) -> None:
        # A continuation does not undo what the client saw: its moments remain those of the first engines. Nor does a
        # prefill engine whose answer comes after the first token.
        if not self._record.num_continuations and not self._reply.started:
            self._record.mark(moment)

    async def _relay(self, engine: Engine, body: bytes, cached: CachedUsage | None) -> None:
        endpoint, settings = engine.endpoint, self._fleet.settings
        stream = self._request.stream
        seconds = settings.first_token_timeout if stream else settings.generation_timeout
        try:
            async with asyncio.timeout(seconds + (cached is not None) * settings.prefill_timeout) as limit:
                if cached is None:  # else that moment comes when the prefill engine is done
                    self._mark(Moment.DECODE_SENT)
                response = await post(self._fleet.session, endpoint, self._request, body, self._record.leg_headers())
                try:
                    if not stream:
                        await relay_whole(response, endpoint, self._reply, self._record, cached)
                        return
                    kind = ResponsesRelay if self._request.api is Api.RESPONSES else StreamRelay
                    gaps = self._fleet.metrics.observe_gap
                    relay = kind(engine, self._reply, self._record, gaps, self._transcript, cached)
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
        share = engine.begin(self._request.demand)
        try:
            try:
                yield
            finally:
                engine.end(share)
            outcome = Outcome.OK
            engine.succeeded()
        except asyncio.CancelledError:
            outcome = Outcome.CANCELLED
            raise
        except EngineFailure as failure:
            outcome = failure.outcome
            engine.suspect(failure)
            raise
        except EngineRejected as error:
            outcome = error.outcome
            engine.succeeded()
            if engine.endpoint.role is Role.PREFILL:
                self._lease = None  # what was refused left nothing behind
            raise
        except RouterError as error:
            outcome = error.outcome
            raise
        finally:
            attempt.finish(outcome)
            self._fleet.metrics.leg_ended(engine, outcome)
