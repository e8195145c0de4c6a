"""A guard against silent wrong tokens: a share of greedy requests is answered once more, by one engine alone.

A KV cache that arrives damaged does not fail; it only makes the model say something else. So some requests whose answer
is determined by the prompt are repeated without a hand-off, in the background, and compared with what the client got.
The repetition computes its prompt anew (`cache_salt` keeps it from cached blocks, which may be the damaged ones), on a
prefill engine if one is alive. Only sampled requests' text is kept, until it is compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import orjson
from prometheus_client import CollectorRegistry, Counter

from router.comparison import (
    NUM_ALTERNATIVES,
    GuardResult,
    Verdict,
    compare,
    streamed_text,
    whole_answer,
    whole_text,
)
from router.errors import RouterError
from router.types import Api, Role
from router.upstream import EngineFailures, post

if TYPE_CHECKING:
    import aiohttp

    from router.engines import Engine, EnginePool
    from router.lifetime import RequestRecord
    from router.reply import Reply
    from router.settings import RouterSettings
    from router.types import GenerationRequest, JsonObject

logger = logging.getLogger(__name__)

MAX_BYTES = 2**20  # of a request and of an answer; longer ones are not sampled
MAX_WAITING = 16  # sampled requests that wait for their turn; about 2 MiB each at most
MAX_OUTSTANDING = 4  # an engine that has more than that from this router has better things to do
PATIENCE = 60.0  # s that a request waits for such a moment
PAUSE = 0.5  # s between two looks
NUM_RECENT = 20  # differences kept for the live page

# With these fields alone is the greedy answer determined by the prompt and its log probabilities comparable: what
# changes logits (penalties, a bias, a grammar) is not in vLLM's log probabilities, and tools have an effect outside.
PLAIN_FIELDS = frozenset(
    (
        *("model", "prompt", "messages", "max_tokens", "max_completion_tokens", "ignore_eos", "stop", "stop_token_ids"),
        *("temperature", "top_p", "top_k", "min_p", "n", "best_of", "seed"),
        *("stream", "stream_options", "logprobs", "top_logprobs", "return_token_ids", "skip_special_tokens"),
        *("spaces_between_special_tokens", "include_stop_str_in_output", "include_reasoning", "reasoning_effort"),
        *("add_special_tokens", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"),
        *("user", "metadata", "store", "priority", "request_id", "cache_salt"),
    )
)
# The client's answer's form, which the comparison sets itself; and `seed`, which greedy sampling does not use.
ANSWER_FIELDS = ("stream", "stream_options", "logprobs", "top_logprobs", "seed", "return_token_ids", "request_id")


class Tape:
    """What one client is sent, as long as it is not too much."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._num_bytes = 0

    def add(self, part: bytes) -> None:
        self._num_bytes += len(part)
        if self.is_complete:
            self._parts.append(part)
        else:
            self._parts.clear()

    @property
    def is_complete(self) -> bool:
        return self._num_bytes <= MAX_BYTES

    def text(self, request: GenerationRequest) -> str:
        """Raises ValueError, TypeError, KeyError or IndexError if it is not what vLLM sends."""
        read = streamed_text if request.stream else whole_text
        return read(request.api, b"".join(self._parts))


@dataclass(frozen=True, slots=True)
class Recent:
    """A difference, for the live page."""

    request_id: str
    result: GuardResult
    position: int | None
    at: float  # unix seconds


class Guard(Protocol):
    share: float

    def watch(self, request: GenerationRequest, reply: Reply) -> Tape | None:
        """Begins to keep what this client is sent, if the request is among those that are checked."""

    def check(self, request: GenerationRequest, record: RequestRecord, tape: Tape) -> None:
        """Compares an answer that ended well, later."""

    def counts(self) -> Mapping[GuardResult, int]:
        """Requests checked since the start, by result."""

    def recent(self) -> list[Recent]:
        """The last ones that were not equal, the newest first."""

    async def close(self) -> None:
        """Ends what is under way."""


class NoGuard:
    share = 0.0

    def watch(self, request: GenerationRequest, reply: Reply) -> Tape | None:
        return None

    def check(self, request: GenerationRequest, record: RequestRecord, tape: Tape) -> None:
        pass

    def counts(self) -> Mapping[GuardResult, int]:
        return {}

    def recent(self) -> list[Recent]:
        return []

    async def close(self) -> None:
        pass


def make_guard(
    settings: RouterSettings, session: aiohttp.ClientSession, pool: EnginePool, registry: CollectorRegistry
) -> Guard:
    if not settings.guard_share:
        return NoGuard()
    return RerunGuard(settings, session, pool, registry)


def is_checkable(request: GenerationRequest) -> bool:
    """Whether the request's answer is determined by what it asks."""
    body = request.body
    return (
        request.api in (Api.COMPLETIONS, Api.CHAT)
        and request.local_prefill is None
        and body.get("temperature") == 0
        and request.num_choices == 1
        and all(name in PLAIN_FIELDS for name, value in body.items() if value is not None and value is not False)
    )


def rerun_body(request: GenerationRequest) -> bytes:
    """The request without a hand-off, cached blocks or a stream, and with log probabilities."""
    body: JsonObject = {name: value for name, value in request.body.items() if name not in ANSWER_FIELDS}
    body.update(stream=False, cache_salt=f"tknp-guard-{request.id}")
    if request.api is Api.CHAT:
        body.update(logprobs=True, top_logprobs=NUM_ALTERNATIVES)
    else:
        body.update(logprobs=NUM_ALTERNATIVES)
    return orjson.dumps(body)


@dataclass(frozen=True, slots=True)
class Job:
    request: GenerationRequest  # without its body
    record: RequestRecord
    body: bytes
    tape: Tape


class RerunGuard:
    def __init__(
        self,
        settings: RouterSettings,
        session: aiohttp.ClientSession,
        pool: EnginePool,
        registry: CollectorRegistry,
    ) -> None:
        self.share = settings.guard_share
        self._tolerance = settings.guard_tie_tolerance
        self._timeout = settings.generation_timeout
        self._session = session
        self._pool = pool
        counter = Counter(
            "tknp_guard_requests",
            "Greedy requests that were answered once more by one engine alone, by how the answers compare.",
            ["result"],
            registry=registry,
        )
        self._counters = {result: counter.labels(result) for result in GuardResult}
        self._counts = dict.fromkeys(GuardResult, 0)
        self._recent: deque[Recent] = deque(maxlen=NUM_RECENT)
        self._jobs: asyncio.Queue[Job] = asyncio.Queue(MAX_WAITING)
        self._workers = [asyncio.create_task(self._work()) for _ in range(settings.guard_concurrency)]

    def watch(self, request: GenerationRequest, reply: Reply) -> Tape | None:
        if random.random() >= self.share or not is_checkable(request):
            return None
        tape = Tape()
        reply.tee(tape.add)
        return tape

    def check(self, request: GenerationRequest, record: RequestRecord, tape: Tape) -> None:
        body = rerun_body(request)
        if not tape.is_complete or len(body) > MAX_BYTES or self._jobs.full():
            self._conclude(record, Verdict(GuardResult.SKIPPED))
            return
        bare = replace(request, id=f"{request.id}-guard", body={}, trace_headers=())
        self._jobs.put_nowait(Job(bare, record, body, tape))

    def counts(self) -> Mapping[GuardResult, int]:
        return self._counts

    def recent(self) -> list[Recent]:
        return list(reversed(self._recent))

    async def close(self) -> None:
        for worker in self._workers:
            worker.cancel()
        for worker in self._workers:
            with contextlib.suppress(asyncio.CancelledError):
                await worker

    async def _work(self) -> None:
        while True:
            job = await self._jobs.get()
            try:
                verdict = await self._rerun(job)
            except RouterError as error:
                logger.warning("guard: request %s could not be repeated: %s", job.record.id, error.logged)
                verdict = Verdict(GuardResult.FAILED)
            except (ValueError, TypeError, KeyError, IndexError) as error:
                logger.warning("guard: the two answers to %s can't be read: %r", job.record.id, error)
                verdict = Verdict(GuardResult.FAILED)
            self._conclude(job.record, verdict)

    async def _rerun(self, job: Job) -> Verdict:
        engine = await self._idle_engine(job)
        if engine is None:
            return Verdict(GuardResult.SKIPPED)
        endpoint = engine.endpoint
        with engine.occupied(job.request.demand), EngineFailures(endpoint):
            async with asyncio.timeout(self._timeout):
                response = await post(self._session, endpoint, job.request, job.body)
                async with response:
                    answer = await response.read()
        return compare(job.tape.text(job.request), whole_answer(job.request.api, answer), self._tolerance)

    async def _idle_engine(self, job: Job) -> Engine | None:
        """The least loaded engine as soon as it has little to do, or None if that takes too long.

        One that did not decode the request: a prefill engine, else another decode engine if there is one.
        """
        decoded_by = job.record.engine(Role.DECODE)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            alive = [engine for role in Role for engine in self._pool.alive(role, job.request.model)]
            others = [engine for engine in alive if engine.endpoint.role is Role.PREFILL] or [
                engine for engine in alive if engine.endpoint != decoded_by
            ]
            engine = min(others or alive, key=lambda engine: engine.num_outstanding, default=None)
            if engine is not None and engine.num_outstanding < MAX_OUTSTANDING:
                return engine
            await asyncio.sleep(PAUSE)
        return None

    def _conclude(self, record: RequestRecord, verdict: Verdict) -> None:
        result = verdict.result
        record.guard = result
        self._counters[result].inc()
        self._counts[result] += 1
        if result not in (GuardResult.TIE, GuardResult.UNCLEAR, GuardResult.DIFFERENT):
            return
        self._recent.append(Recent(record.id, result, verdict.position, time.time()))
        fields = {
            "request_id": record.id,
            "result": result,
            "position": verdict.position,
            "token": verdict.token,
            "gap": verdict.gap,
            "attempts": [attempt.endpoint.name for attempt in record.attempts],
        }
        level = logging.ERROR if result is GuardResult.DIFFERENT else logging.INFO
        logger.log(level, "guard: two answers to one greedy request part", extra={"fields": fields})
