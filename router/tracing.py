"""Where a request's trace begins, and who gets its spans: nobody, unless a collector is named (router/otlp.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from router.lifetime import RequestRecord
    from router.settings import RouterSettings
    from router.trace_context import TraceContext, TraceHeaders


class Tracing(Protocol):
    def begin(self, headers: TraceHeaders) -> TraceContext | None:
        """The place of a request that came with these trace headers; None if nothing is traced here."""

    def export(self, record: RequestRecord) -> None:
        """Takes over a request that ended."""

    async def close(self) -> None:
        """Sends what is left."""


class NoTracing:
    """The clients' trace headers go to the engines as they are."""

    def begin(self, headers: TraceHeaders) -> TraceContext | None:
        return None

    def export(self, record: RequestRecord) -> None:
        pass

    async def close(self) -> None:
        pass


def make_tracing(settings: RouterSettings) -> Tracing:
    if not settings.otlp_traces_endpoint:
        return NoTracing()
    from router.otlp import OtlpTracing, make_exporter  # only here: a router that does not trace saves 15 MiB

    return OtlpTracing(make_exporter(settings), settings.trace_sample_ratio)
