"""A request's life, recorded once; every metric, the log line and GET /requests/{id} are derived from it.

    received -> prefill_sent -> prefill_done -> decode_sent --------------------------------> first_token -> last_token
                                                     |                                             |
                                                     +-> transfer_begin -> transfer_end -----------+
                                                         (the decode engine tells these afterwards)

`failed` or `cancelled` replaces whatever had not happened yet. A local prefill skips prefill_sent and prefill_done; an
answer that is not streamed has no first_token. After a retry the moments are those of the last attempt.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from router.types import Api, Endpoint, LocalPrefill, Outcome, Role


class Moment(StrEnum):
    RECEIVED = "received"
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

    ROUTE = "route"  # reading, checking and choosing
    PREFILL = "prefill"
    HANDOFF = "handoff"  # the router's own time between the legs
    TRANSFER = "transfer"
    FIRST_TOKEN = "first_token"  # decode engine: queue, transfer, first step
    DECODE = "decode"
    TOTAL = "total"


BOUNDS: dict[Phase, tuple[Moment, Moment]] = {
    Phase.ROUTE: (Moment.RECEIVED, Moment.PREFILL_SENT),
    Phase.PREFILL: (Moment.PREFILL_SENT, Moment.PREFILL_DONE),
    Phase.HANDOFF: (Moment.PREFILL_DONE, Moment.DECODE_SENT),
    Phase.TRANSFER: (Moment.TRANSFER_BEGIN, Moment.TRANSFER_END),
    Phase.FIRST_TOKEN: (Moment.DECODE_SENT, Moment.FIRST_TOKEN),
    Phase.DECODE: (Moment.FIRST_TOKEN, Moment.LAST_TOKEN),
    Phase.TOTAL: (Moment.RECEIVED, Moment.LAST_TOKEN),
}

# The phase that a request in flight is in, by the last moment that it passed.
IN_FLIGHT: dict[Moment, Phase] = {
    Moment.RECEIVED: Phase.ROUTE,
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


@dataclass(frozen=True, slots=True)
class Transfer:
    """What the decode engine says of a hand-off."""

    rank: int
    kv_bytes: int
    num_transfers: int


@dataclass(slots=True)
class RequestRecord:
    """One request, from the first byte of its headers to its end."""

    id: str
    api: Api
    model: str | None = None
    stream: bool = False
    local_prefill: LocalPrefill | None = None
    outcome: Outcome | None = None
    error: str | None = None
    status: int | None = None
    num_chunks: int = 0
    num_continuations: int = 0  # times that another engine went on with the stream
    attempts: list[Attempt] = field(default_factory=list)
    transfer: Transfer | None = None
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

    def phases(self) -> dict[Phase, float]:
        """Seconds of each phase that the request went through."""
        spans = {phase: self.between(*bounds) for phase, bounds in BOUNDS.items()}
        return {phase: seconds for phase, seconds in spans.items() if seconds is not None}

    def engine(self, role: Role) -> Endpoint | None:
        """The engine of that role that was used last."""
        return next((a.endpoint for a in reversed(self.attempts) if a.endpoint.role is role), None)

    def as_dict(self) -> dict[str, Any]:
        """What the log line and GET /requests/{id} hold."""
        return {
            "request_id": self.id,
            "endpoint": self.api,
            "model": self.model,
            "stream": self.stream,
            "outcome": self.outcome,
            "status": self.status,
            "error": self.error,
            "local_prefill": self.local_prefill,
            "attempts": [
                {"role": a.endpoint.role, "engine": a.endpoint.name, "outcome": a.outcome} for a in self.attempts
            ],
            "num_chunks": self.num_chunks,
            "num_continuations": self.num_continuations,
            "moments": {moment.value: at for moment, at in self.moments.items()},
            "phases": {phase.value: round(seconds, 6) for phase, seconds in self.phases().items()},
            "kv_transfer": self.transfer
            and {
                "rank": self.transfer.rank,
                "kv_bytes": self.transfer.kv_bytes,
                "num_transfers": self.transfer.num_transfers,
            },
        }
