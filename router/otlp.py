"""OpenTelemetry spans of a request, made from its record once it has ended, and sent in batches from a thread.

    POST /v1/completions             the router's; child of the client's span, if it sent one
      queue, route, handoff          the phases in which the router itself has the request
      prefill host:port              one for each leg that was sent; the engine's own spans are its children
      decode host:port
        transfer, first_token, decode, answer

A request in flight costs two random numbers and one header; nothing is done for it before its end.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from router.lifetime import BOUNDS, Phase
from router.trace_context import MAX_SPAN_ID, TraceContext, TraceHeaders
from router.types import Outcome, Role
from tknp import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from router.lifetime import Attempt, Moment, RequestRecord
    from router.settings import RouterSettings

PROPAGATOR = TraceContextTextMapPropagator()
SAMPLED = TraceFlags(TraceFlags.SAMPLED)

EXPORT_TIMEOUT = 5.0  # s; a collector that is slower loses spans, and nobody waits for it but the exit
BATCH_INTERVAL = 1000.0  # ms between two batches

NO_SPAN = {Phase.TOTAL, Phase.PREFILL}  # they are the request's span and the prefill leg's
IN_DECODE_LEG = {Phase.TRANSFER, Phase.FIRST_TOKEN, Phase.DECODE, Phase.ANSWER}


def make_exporter(settings: RouterSettings) -> SpanExporter:
    endpoint = settings.otlp_traces_endpoint
    if settings.otlp_traces_protocol == "grpc":
        return GrpcExporter(endpoint=endpoint, insecure=not endpoint.startswith("https"), timeout=EXPORT_TIMEOUT)
    return HttpExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT)


class OtlpTracing:
    def __init__(self, exporter: SpanExporter, sample_ratio: float) -> None:
        self._sample_ratio = sample_ratio
        self._resource = Resource.create({"service.name": "tknp-router", "service.version": __version__})
        self._processor = BatchSpanProcessor(exporter, schedule_delay_millis=BATCH_INTERVAL)

    def begin(self, headers: TraceHeaders) -> TraceContext:
        """The client's decision whether to sample stands; without one it is ours, by the ratio."""
        span_id = random.getrandbits(64) % MAX_SPAN_ID + 1
        parent = _extract(headers) if headers else None
        if parent is None:
            is_sampled = random.random() < self._sample_ratio
            return TraceContext(random.getrandbits(128) or 1, span_id, None, is_sampled)
        return TraceContext(
            parent.trace_id, span_id, parent.span_id, parent.trace_flags.sampled, parent.trace_state.to_header()
        )

    def export(self, record: RequestRecord) -> None:
        if record.trace is None or not record.trace.is_sampled:
            return
        for span in self._spans(record, record.trace):
            self._processor.on_end(span)

    async def close(self) -> None:
        await asyncio.to_thread(self._processor.shutdown)

    def _spans(self, record: RequestRecord, trace: TraceContext) -> Iterator[ReadableSpan]:
        yield self._span(
            trace,
            f"POST {record.api}",
            trace.span_id,
            trace.parent_id,
            (record.moments[BOUNDS[Phase.TOTAL][0]], record.ended_at),
            _request_attributes(record),
            SpanKind.SERVER,
            _failure(record.outcome, record.logged_error),
        )
        decode_span_id = trace.span_id
        for index, attempt in enumerate(record.attempts):
            span_id = trace.leg_span_id(index)
            if attempt.endpoint.role is Role.DECODE:
                decode_span_id = span_id
            yield self._span(
                trace,
                f"{attempt.endpoint.role} {attempt.endpoint.name}",
                span_id,
                trace.span_id,
                (record.wall_time(attempt.begin), record.wall_time(attempt.end or attempt.begin)),
                _leg_attributes(attempt, index),
                SpanKind.CLIENT,
                _failure(attempt.outcome, None),
            )
        for phase, bounds in record.phase_bounds().items():
            if phase not in NO_SPAN:
                parent_id = decode_span_id if phase in IN_DECODE_LEG else trace.span_id
                attributes = _transfer_attributes(record) if phase is Phase.TRANSFER else {}
                times = _times(record.moments, bounds)
                yield self._span(trace, phase.value, random.getrandbits(64) or 1, parent_id, times, attributes)

    def _span(
        self,
        trace: TraceContext,
        name: str,
        span_id: int,
        parent_id: int | None,
        times: tuple[float, float],
        attributes: Mapping[str, str | int],
        kind: SpanKind = SpanKind.INTERNAL,
        failure: str | None = None,
    ) -> ReadableSpan:
        """Times in unix seconds. A ReadableSpan and not a Tracer's: its ids and times were fixed before it was made."""
        begin, end = times
        return ReadableSpan(
            name,
            context=_context(trace, span_id),
            parent=None if parent_id is None else _context(trace, parent_id),
            resource=self._resource,
            attributes=attributes,
            kind=kind,
            status=Status() if failure is None else Status(StatusCode.ERROR, failure),
            start_time=int(begin * 1e9),
            end_time=int(max(begin, end) * 1e9),
        )


def _context(trace: TraceContext, span_id: int) -> SpanContext:
    return SpanContext(trace.trace_id, span_id, is_remote=False, trace_flags=SAMPLED)


def _extract(headers: TraceHeaders) -> SpanContext | None:
    """The client's SpanContext, None if its headers are not W3C's."""
    context = get_current_span(PROPAGATOR.extract(dict(headers))).get_span_context()
    return context if context.is_valid else None


def _times(moments: Mapping[Moment, float], bounds: tuple[Moment, Moment]) -> tuple[float, float]:
    begin, end = bounds
    return moments[begin], moments[end]


def _failure(outcome: Outcome | None, error: str | None) -> str | None:
    return None if outcome in (Outcome.OK, Outcome.CANCELLED, None) else error or str(outcome)


def _request_attributes(record: RequestRecord) -> dict[str, str | int]:
    """Names of OpenTelemetry's semantic conventions where there is one."""
    found: dict[str, str | int | None] = {
        "http.request.method": "POST",
        "url.path": record.api,
        "http.response.status_code": record.status,
        "gen_ai.request.model": record.logged_model,
        "tknp.request_id": record.id,
        "tknp.outcome": record.outcome,
        "tknp.local_prefill": record.local_prefill,
        "tknp.num_chunks": record.num_chunks,
    }
    return {name: value for name, value in found.items() if value is not None}


def _leg_attributes(attempt: Attempt, index: int) -> dict[str, str | int]:
    return {
        "tknp.role": attempt.endpoint.role,
        "server.address": attempt.endpoint.name,
        "tknp.outcome": attempt.outcome or "unfinished",
        "tknp.leg": index,
    }


def _transfer_attributes(record: RequestRecord) -> dict[str, str | int]:
    transfer = record.transfer
    return {} if transfer is None else {"tknp.rank": transfer.rank, "tknp.kv_bytes": transfer.kv_bytes}
