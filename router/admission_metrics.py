"""Metrics of admission and of the check of API keys.

Labels are bounded: a key is a label by the name that the key file gives it, and all without one share "unnamed".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.callers import Priority
from router.metrics import PHASE_BUCKETS
from router.types import Rejection

if TYPE_CHECKING:
    from collections.abc import Iterable

    from router.admission import Admission


class AdmissionMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        wait = Histogram(
            "tknp_queue_wait_seconds",
            "Seconds that admitted requests had waited for their turn; those that found room at once are not counted.",
            ["priority"],
            buckets=PHASE_BUCKETS,
            registry=registry,
        )
        self._wait = {priority: wait.labels(priority.label) for priority in Priority}
        rejected = Counter(
            "tknp_rejected_requests",
            "Requests that admission turned away, and why.",
            ["priority", "reason"],
            registry=registry,
        )
        self._rejected = {(p, reason): rejected.labels(p.label, reason) for p in Priority for reason in Rejection}
        refused = Counter(
            "tknp_unauthorized_requests",
            "Requests without an API key, or with one that is not known.",
            ["reason"],
            registry=registry,
        )
        self._missing, self._unknown = refused.labels("missing"), refused.labels("unknown")
        self._connections = Counter(
            "tknp_refused_connections",
            "Requests that were refused because their connection was one too many.",
            registry=registry,
        )

    def waited(self, priority: Priority, seconds: float) -> None:
        self._wait[priority].observe(seconds)

    def rejected(self, priority: Priority, reason: Rejection) -> None:
        self._rejected[priority, reason].inc()

    def unauthorized(self, *, is_missing: bool) -> None:
        (self._missing if is_missing else self._unknown).inc()

    def connection_refused(self) -> None:
        self._connections.inc()


class AdmissionCollector(Collector):
    """Gauges that are read from admission's own state at each scrape."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    def collect(self) -> Iterable[Metric]:
        length = GaugeMetricFamily("tknp_queue_length", "Requests that wait for their turn.", labels=["priority"])
        for priority, count in self._admission.queue.lengths().items():
            length.add_metric([priority.label], count)
        in_flight = GaugeMetricFamily(
            "tknp_admitted_requests",
            "Requests that were admitted and have not ended.",
            value=self._admission.num_in_flight,
        )
        limit = GaugeMetricFamily(
            "tknp_admitted_requests_limit",
            "Requests that may be admitted at once.",
            value=self._admission.max_in_flight,
        )
        by_key = GaugeMetricFamily(
            "tknp_key_open_requests",
            "Requests in the router, waiting ones too, by the name of their key.",
            labels=["key"],
        )
        for name, count in self._open_by_name().items():
            by_key.add_metric([name], count)
        yield from (length, in_flight, limit, by_key)

    def _open_by_name(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for account in list(self._admission.accounts.values()):
            name = account.caller.name or "unnamed"
            counts[name] = counts.get(name, 0) + account.num_open
        return counts
