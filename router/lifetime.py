"""A request's life, recorded once; every metric, the log line and GET /requests/{id} are derived from it.

    received -> prefill_sent -> prefill_done -> decode_sent --------------------------------> first_token -> last_token
                                                     |                                             |
                                                     +-> transfer_begin -> transfer_end -----------+
                                                         (the decode engine tells these afterwards)

A request that has to wait for its turn passes queued and admitted after received. `failed` or `cancelled` replaces
whatever had not happened yet. A local prefill skips prefill_sent and prefill_done; an answer that is not streamed has
no first_token. After a retry the moments are those of the last attempt; each attempt keeps its own begin and end.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from router.callers import ANONYMOUS, Caller

if TYPE_CHECKING:
    from router.comparison import GuardResult
    from router.trace_context import TraceContext, TraceHeaders
    from router.types import Api, Endpoint, LocalPrefill, Outcome, Role, Task

MAX_LOGGED_CHARS = 300  # of a text that a client chose or an engine sent


class Moment(StrEnum):
    RECEIVED = "received"
    QUEUED = "queued"
    ADMITTED = "admitted"
    PREFILL_SENT = "prefill_sent"
    PREFILL_DONE = "prefill_done"
    DECODE_SENT = "decode_sent"
    TRANSFER_BEGIN = "transfer_begin"
    TRANSFER_END = "transfer_end"
    FIRST_TOKEN = "first_token"
    LAST_TOKEN = "last_token"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Phase(StrEnum):
    """The time between two moments. The values are labels of a metric."""

    ROUTE = "route"  # reading, checking, waiting for its turn, and choosing
    QUEUE = "queue"  # of that, the wait
    PREFILL = "prefill"
    HANDOFF = "handoff"  # the router's own time between the legs
    TRANSFER = "transfer"
    FIRST_TOKEN = "first_token"  # decode engine: queue, transfer, first step
    DECODE = "decode"
    ANSWER = "answer"  # of a request that is not streamed: the whole decode leg
    TOTAL = "total"


# The route phase ends with the first leg, which is the decode leg's where there is no prefill leg.
BOUNDS: dict[Phase, tuple[Moment, Moment]] = {
    Phase.ROUTE: (Moment.RECEIVED, Moment.PREFILL_SENT),
    Phase.QUEUE: (Moment.QUEUED, Moment.ADMITTED),
    Phase.PREFILL: (Moment.PREFILL_SENT, Moment.PREFILL_DONE),
    Phase.HANDOFF: (Moment.PREFILL_DONE, Moment.DECODE_SENT),
    Phase.TRANSFER: (Moment.TRANSFER_BEGIN, Moment.TRANSFER_END),
    Phase.FIRST_TOKEN: (Moment.DECODE_SENT, Moment.FIRST_TOKEN),
    Phase.DECODE: (Moment.FIRST_TOKEN, Moment.LAST_TOKEN),
    Phase.ANSWER: (Moment.DECODE_SENT, Moment.LAST_TOKEN),
    Phase.TOTAL: (Moment.RECEIVED, Moment.LAST_TOKEN),
}

# The phase that a request in flight is in, by the last moment that it passed.
IN_FLIGHT: dict[Moment, Phase] = {
    Moment.RECEIVED: Phase.ROUTE,
    Moment.QUEUED: Phase.QUEUE,
    Moment.ADMITTED: Phase.ROUTE,
    Moment.PREFILL_SENT: Phase.PREFILL,
    Moment.PREFILL_DONE: Phase.HANDOFF,
    Moment.DECODE_SENT: Phase.FIRST_TOKEN,
    Moment.FIRST_TOKEN: Phase.DECODE,
}


@dataclass(slots=True)
class Attempt:
    """One leg sent to one engine; `outcome` is None while it runs."""

    endpoint: Endpoint
    outcome: Outcome | None = None
    begin: float = field(default_factory=time.perf_counter)  # s by time.perf_counter
    end: float | None = None

    def finish(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.end = time.perf_counter()


@dataclass(frozen=True, slots=True)
class Transfer:
    """What the decode engine says of a hand-off."""

    rank: int
    kv_bytes: int
    num_transfers: int
    hidden_bytes: int = 0  # of these, arrived when the prompt was computed


@dataclass(slots=True)
class RequestRecord:
    """One request, from the first byte of its headers to its end."""

    id: str
    api: Api | Task
    caller: Caller = ANONYMOUS
    model: str | None = None
    stream: bool = False
    local_prefill: LocalPrefill | None = None
    outcome: Outcome | None = None
    error: str | None = None  # for the log: without anything of the client's text
    status: int | None = None
    num_chunks: int = 0
    num_continuations: int = 0  # times that another engine went on with the stream
    attempts: list[Attempt] = field(default_factory=list)
    transfer: Transfer | None = None
    trace: TraceContext | None = None
    guard: GuardResult | None = None  # of a request whose answer was checked
    last: Moment = Moment.RECEIVED
    moments: dict[Moment, float] = field(default_factory=dict)  # unix seconds
    # Moments advance with a clock that never jumps; only their origin is the wall clock.
    _offset: float = field(default_factory=lambda: time.time() - time.perf_counter())

    def __post_init__(self) -> None:
        self.mark(Moment.RECEIVED)

    def mark(self, moment: Moment) -> None:
        if moment in self.moments:  # a retry: what the attempt before went through is void
            names = list(self.moments)
            for name in names[names.index(moment) :]:
                del self.moments[name]
        self.moments[moment] = time.perf_counter() + self._offset
        self.last = moment

    def mark_transfer(self, transfer: Transfer, begin: float, end: float) -> None:
        """Begin and end in unix seconds, by the decode engine's clock."""
        self.transfer = transfer
        self.moments[Moment.TRANSFER_BEGIN] = begin
        self.moments[Moment.TRANSFER_END] = end

    def between(self, begin: Moment, end: Moment) -> float | None:
        """Seconds, None unless both were passed."""
        if begin not in self.moments or end not in self.moments:
            return None
        return max(0.0, self.moments[end] - self.moments[begin])

    def phase_bounds(self) -> dict[Phase, tuple[Moment, Moment]]:
        """The phases that the request went through, and between which of its moments."""
        passed = self.moments
        found = {phase: bounds for phase, bounds in BOUNDS.items() if bounds[0] in passed and bounds[1] in passed}
        if Moment.FIRST_TOKEN in passed:
            found.pop(Phase.ANSWER, None)
        if Moment.PREFILL_SENT not in passed and Moment.DECODE_SENT in passed:
            found[Phase.ROUTE] = (BOUNDS[Phase.ROUTE][0], Moment.DECODE_SENT)
        return found

    def phases(self) -> dict[Phase, float]:
        """Seconds of each phase that the request went through."""
        return {
            phase: max(0.0, self.moments[end] - self.moments[begin])
            for phase, (begin, end) in self.phase_bounds().items()
        }

    def wall_time(self, at: float) -> float:
        """A reading of time.perf_counter in unix seconds."""
        return at + self._offset

    @property
    def ended_at(self) -> float:
        """Unix seconds of the last moment of a request that ended."""
        return self.moments[self.last]

    @property
    def logged_model(self) -> str | None:
        return self.model and self.model[:MAX_LOGGED_CHARS]

    @property
    def logged_error(self) -> str | None:
        return self.error and self.error[:MAX_LOGGED_CHARS]

    def leg_headers(self) -> TraceHeaders:
        """The trace headers of the leg that was begun last; empty if this router does not trace."""
        return self.trace.leg_headers(len(self.attempts) - 1) if self.trace is not None else ()

    def is_visible_to(self, caller: Caller) -> bool:
        return caller.is_admin or caller.id == self.caller.id

    def engine(self, role: Role) -> Endpoint | None:
        """The engine of that role that was used last."""
        return next((a.endpoint for a in reversed(self.attempts) if a.endpoint.role is role), None)

    def as_dict(self) -> dict[str, Any]:
        """What the log line and GET /requests/{id} hold."""
        return {
            "request_id": self.id,
            "trace_id": self.trace and f"{self.trace.trace_id:032x}",
            "endpoint": self.api,
            "key": self.caller.name,
            "model": self.logged_model,
            "stream": self.stream,
            "outcome": self.outcome,
            "status": self.status,
            "error": self.logged_error,
            "local_prefill": self.local_prefill,
            "guard": self.guard,
            "attempts": [
                {"role": a.endpoint.role, "engine": a.endpoint.name, "outcome": a.outcome} for a in self.attempts
            ],
            "num_chunks": self.num_chunks,
            "num_continuations": self.num_continuations,
            "moments": {moment.value: at for moment, at in self.moments.items()},
            # round(seconds, 6) takes five times as long.
            "phases": {phase.value: round(1e6 * seconds) / 1e6 for phase, seconds in self.phases().items()},
            "kv_transfer": self.transfer
            and {
                "rank": self.transfer.rank,
                "kv_bytes": self.transfer.kv_bytes,
                "num_transfers": self.transfer.num_transfers,
                "hidden_bytes": self.transfer.hidden_bytes,
            },
        }
