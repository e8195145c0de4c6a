"""Where a request stands in a W3C trace, and what the engines are told of it.

Ids are chosen when the request arrives, because the engines need them; the spans that bear them are made when it ended
(router/tracing.py). A leg's id follows from the request's: nothing has to be kept for it.
"""

from __future__ import annotations

from dataclasses import dataclass

TraceHeaders = tuple[tuple[str, str], ...]

MAX_SPAN_ID = 2**64 - 2**16  # of a request; the legs' follow upon it


@dataclass(frozen=True, slots=True)
class TraceContext:
    """One request's place: `span_id` is the router's span, `parent_id` the client's, None if the trace begins here."""

    trace_id: int
    span_id: int
    parent_id: int | None
    is_sampled: bool
    state: str = ""  # the client's tracestate, passed on as it is

    def leg_span_id(self, index: int) -> int:
        """The id of the request's leg number `index`, from 0."""
        return self.span_id + 1 + index

    def leg_headers(self, index: int) -> TraceHeaders:
        """What the engine of that leg gets: its spans become children of the leg's."""
        parent = f"00-{self.trace_id:032x}-{self.leg_span_id(index):016x}-{self.is_sampled:02x}"
        return (("traceparent", parent), ("tracestate", self.state)) if self.state else (("traceparent", parent),)
