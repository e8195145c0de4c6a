"""The engines, what is known of each, and the choice among those that can serve."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from router.breaker import CircuitBreaker
from router.errors import EngineFailure, FailureKind, ModelNotFound, NoEngine
from router.fit import misfit
from router.load import EngineLoad
from router.room import has_room
from router.roster import Roster, Rosters
from router.types import Endpoint, JsonObject, Role

if TYPE_CHECKING:
    from router.choice import Chooser
    from router.demand import Demand
    from router.load import Share
    from router.types import GenerationRequest, LocalPrefill

logger = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 5  # about what an engine that was restarted in place needs to answer again, at best


class Engine:
    """One engine: whether it is up, the models it serves, and the requests it has from us."""

    def __init__(
        self, endpoint: Endpoint, breaker_failures: int = 5, on_change: Callable[[], None] = lambda: None
    ) -> None:
        """`on_change` is called when it may get other requests than before."""
        self.endpoint = endpoint
        self.breaker = CircuitBreaker(breaker_failures)
        self._on_change = on_change
        self.is_up = False
        self._is_paused = False
        self._is_leaving = False
        self.down_reason = "not checked yet"
        self.models: dict[str, JsonObject] = {}  # name -> vLLM's model card
        self.kv_traits: dict[str, str] = {}  # what must be equal on both sides of a hand-off; empty if it does not tell
        self.num_outstanding = 0
        self.num_chosen = 0
        self.load = EngineLoad(endpoint.role)
        self.num_progress = 0  # grows while it generates for clients
        self.suspected = asyncio.Event()  # wakes the health check before its time

    @property
    def is_paused(self) -> bool:
        """The operator wants it to end what it has."""
        return self._is_paused

    @is_paused.setter
    def is_paused(self, is_paused: bool) -> None:
        self._is_paused = is_paused
        self._on_change()

    @property
    def is_leaving(self) -> bool:
        """Discovery wants that: it is gone, is not ready, or is to have another role."""
        return self._is_leaving

    @is_leaving.setter
    def is_leaving(self, is_leaving: bool) -> None:
        self._is_leaving = is_leaving
        self._on_change()

    @property
    def is_draining(self) -> bool:
        """It ends what it has, and gets nothing new."""
        return self._is_paused or self._is_leaving

    def mark_up(self, models: dict[str, JsonObject], kv_traits: dict[str, str]) -> None:
        if self.is_up and (models, kv_traits) == (self.models, self.kv_traits):
            return
        self.models, self.kv_traits = models, kv_traits
        if not self.is_up:
            self.is_up, self.down_reason = True, ""
            logger.info("%s engine %s is up and serves %s", self.endpoint.role, self.endpoint.name, ", ".join(models))
        self._on_change()

    def mark_down(self, reason: str) -> None:
        was_up, self.is_up, self.down_reason = self.is_up, False, reason
        if was_up:
            logger.warning("%s engine %s is down: %s", self.endpoint.role, self.endpoint.name, reason)
            self.load.forget("the engine is down")
            self._on_change()

    def succeeded(self) -> None:
        """A request ended well here."""
        self.num_progress += 1
        was_open = self.breaker.is_open
        self.breaker.succeeded()
        if was_open:
            self._on_change()

    def proved(self) -> None:
        """It has just generated something for the health check."""
        was_open = self.breaker.is_open
        self.breaker.proved()
        if was_open:
            self._on_change()

    def suspect(self, failure: EngineFailure) -> None:
        """A request failed here. A connection that is refused is proof enough; anything else is checked at once."""
        if self.breaker.failed():
            logger.warning("%s engine %s fails request after request", self.endpoint.role, self.endpoint.name)
            self._on_change()
        if failure.kind is FailureKind.REFUSED:
            self.mark_down(failure.detail)
        self.suspected.set()

    def begin(self, demand: Demand) -> Share:
        """Counts a request and its tokens as outstanding, until `end` gets what this returns."""
        self.num_outstanding += 1
        self.num_chosen += 1
        return self.load.begin(demand)

    def end(self, share: Share) -> None:
        self.num_outstanding -= 1
        self.load.end(share)

    @contextmanager
    def occupied(self, demand: Demand) -> Iterator[None]:
        """`begin` and, however the block ends, `end`."""
        share = self.begin(demand)
        try:
            yield
        finally:
            self.end(share)


class EnginePool:
    """All engines of both roles, and who chooses among them."""

    def __init__(self, endpoints: Sequence[Endpoint], chooser: Chooser, breaker_failures: int) -> None:
        self.chooser = chooser
        self._breaker_failures = breaker_failures
        self._changed = asyncio.Event()
        self._set([self._make(endpoint) for endpoint in endpoints])

    def _make(self, endpoint: Endpoint) -> Engine:
        return Engine(endpoint, self._breaker_failures, self._forget_rosters)

    def add(self, endpoint: Endpoint) -> Engine:
        """It gets requests once a health check has found it up."""
        engine = self._make(endpoint)
        self._replace([*self.engines, engine])
        return engine

    def remove(self, engine: Engine) -> None:
        """Forgets an engine that has nothing left to do."""
        self._replace([other for other in self.engines if other is not engine])

    def _replace(self, engines: list[Engine]) -> None:
        self._set(engines)
        self._changed.set()
        self._changed = asyncio.Event()

    def _set(self, engines: list[Engine]) -> None:
        # New lists: /metrics may be walking the old ones on a thread of its own.
        self.engines = engines
        self._of = {role: [engine for engine in engines if engine.endpoint.role is role] for role in Role}
        self._forget_rosters()

    def _forget_rosters(self) -> None:
        self._rosters: Rosters | None = None

    def _known(self) -> Rosters:
        if self._rosters is None:
            self._rosters = Rosters(self.engines)
        return self._rosters

    async def for_each(self, work: Callable[[Engine], Coroutine[Any, Any, None]]) -> None:
        """Runs `work` for every engine from when it joins until it leaves. Never ends, unless `work` raises."""
        running: dict[Engine, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as group:
            while True:
                changed, engines = self._changed, self.engines
                for engine in running.keys() - set(engines):
                    running.pop(engine).cancel()
                running |= {engine: group.create_task(work(engine)) for engine in engines if engine not in running}
                await changed.wait()

    def of(self, role: Role) -> list[Engine]:
        return self._of[role]

    def roster(self, model: str) -> Roster:
        return self._known().of(model)

    def alive(self, role: Role, model: str) -> Sequence[Engine]:
        """The engines that a request for the model may be sent to."""
        return self.roster(model).of(role)

    def choose(
        self, role: Role, request: GenerationRequest, tried: Collection[Endpoint], prefilled_by: Engine | None = None
    ) -> Engine | None:
        """An engine that serves the request's model and was not tried for it, or None when every one alive was.

        A decode engine is one that can read the KV cache of `prefilled_by`; a prefill engine one whose KV cache some
        decode engine alive can read. Raises NoEngine when there is none at all.
        """
        roster = self.roster(request.model)
        engines, decode = roster.of(role), roster.of(Role.DECODE)
        if not engines or not decode:
            raise self._no_engine(role if not engines else Role.DECODE, request.model)
        if role is Role.PREFILL:
            engines = roster.readable or self._refuse_misfits(engines, decode)
        elif prefilled_by is not None:
            engines = roster.readers(prefilled_by) or self._refuse_misfits([prefilled_by], engines)
        untried = [engine for engine in engines if engine.endpoint not in tried] if tried else engines
        return self.chooser.choose(role, untried, request.demand) if untried else None

    def local_prefill(self, request: GenerationRequest) -> LocalPrefill | None:
        """Why the request should go to a decode engine alone, by what is known right now; None if it should not."""
        roster = self.roster(request.model)
        return self.chooser.local_prefill(roster.of(Role.PREFILL), roster.of(Role.DECODE), request)

    def has_room(self, request: GenerationRequest) -> bool:
        """Whether a decode engine has room for the request now, and it need not wait for others to end.

        True as well where waiting would not help: no engine is alive, one does not tell, one has nothing to do, or no
        rank could ever hold the request.
        """
        kvs = [engine.load.kv for engine in self.alive(Role.DECODE, request.model)]
        rooms = (None if kv.is_idle else kv.rooms for kv in kvs)
        num_tokens = request.demand.num_sequence_tokens
        return (
            not kvs
            or has_room(rooms, num_tokens, request.demand.num_choices)
            or num_tokens > max(kv.capacity or 0 for kv in kvs)
        )

    def require(self, model: str, roles: Collection[Role]) -> None:
        """Raises ModelNotFound or NoEngine unless each of the roles has an engine alive for the model.

        Without a prefill engine decode engines serve alone, if the settings let them.
        """
        known, roster = self._known().known, self.roster(model)  # a dead engine's models are known: that is a 503
        if known and model not in known:
            raise ModelNotFound(
                f"The model {model!r} is not served here; use one of: {', '.join(sorted(known))}.", param="model"
            )
        for role in roles:
            may_lack = role is Role.PREFILL and self.chooser.serves_decode_only
            if not may_lack and not roster.of(role):
                raise self._no_engine(role, model)
        if Role.PREFILL in roles:
            prefill, decode = roster.of(Role.PREFILL), roster.of(Role.DECODE)
            if prefill and decode and not roster.readable:
                self._refuse_misfits(prefill, decode)

    def models(self) -> Mapping[str, JsonObject]:
        """Name -> model card of everything that a decode engine alive serves."""
        return self._known().cards

    def missing(self) -> list[str]:
        """What stands between this pool and its first token; empty when a request can be served."""
        needed = (Role.DECODE,) if self.chooser.serves_decode_only else tuple(Role)
        faults = [
            f"no {role} engine is up"
            for role in needed
            if not any(e.is_up and not e.is_draining for e in self.of(role))
        ]
        if not faults:
            decoded = self.models().keys()
            both = self._prefilled() & decoded
            if not both and not self.chooser.serves_decode_only:
                faults.append("no model is served by both a prefill and a decode engine")
            for model in both:
                try:
                    self.require(model, tuple(Role))
                except NoEngine as error:
                    faults.append(error.message)
        return faults

    def degraded(self) -> list[str]:
        """What is worse than it should be, although requests are served: models that no prefill engine alive has."""
        if not self.chooser.serves_decode_only:
            return []
        alone = sorted(self.models().keys() - self._prefilled())
        return [
            f"no prefill engine is up for {model}: decode engines prefill its prompts themselves" for model in alone
        ]

    def _prefilled(self) -> set[str]:
        return {name for e in self.of(Role.PREFILL) if e.is_up and not e.is_draining for name in e.models}

    def _refuse_misfits(self, prefill: Sequence[Engine], decode: Sequence[Engine]) -> NoReturn:
        """No decode engine can read what any of the prefill engines keeps; says what differs."""
        raise NoEngine(
            f"No decode engine can read a prefill engine's KV cache: {misfit(prefill[0], decode[0])}. "
            "Start both with the same model and settings.",
            retry_after=RETRY_AFTER_SECONDS,
        )

    def _no_engine(self, role: Role, model: str) -> NoEngine:
        engines = self.of(role)
        num_up = sum(engine.is_up for engine in engines)
        state = f"{num_up} of {len(engines)} {role} engines are up" + (f", none serves {model!r}" if num_up else "")
        num_draining = sum(engine.is_draining for engine in engines)
        if num_draining:
            state += f"; {num_draining} are draining"
        return NoEngine(
            f"No {role} engine can take the request: {state}. Retry in {RETRY_AFTER_SECONDS} s.",
            retry_after=RETRY_AFTER_SECONDS,
        )
