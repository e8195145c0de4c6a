"""The router's metrics. Every value is derived from request records or read from the engine pool when scraped.

Labels are bounded: engines come from the settings or discovery, which also says when they go, everything else from an
enum.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from itertools import product
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.lifetime import IN_FLIGHT, Moment, Phase
from router.loop_histogram import LoopHistogram
from router.types import Api, LeaseEnd, LocalPrefill, NoContinuation, Outcome, Role, Task

if TYPE_CHECKING:
    from router.engines import Engine, EnginePool
    from router.lifetime import RequestRecord
    from router.records import RecordStore
    from router.types import Endpoint

# Seconds. From what a hand-off costs on one host to what a queue costs under overload.
PHASE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
GAP_BUCKETS = (0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 10, 60)


class RouterMetrics:
    """What is counted as requests run. Children that the hot path needs are looked up once."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._legs = {
            Role.PREFILL: Counter(
                "prefill_requests",
                "Prefill legs sent, by engine and how they ended.",
                ["engine", "outcome"],
                registry=registry,
            ),
            Role.DECODE: Counter(
                "decode_requests",
                "Decode legs sent, by engine and how they ended.",
                ["engine", "outcome"],
                registry=registry,
            ),
        }
        self._ended_legs: dict[tuple[Endpoint, Outcome], Counter] = {}  # children of those
        requests = Counter(
            "tknp_requests", "Requests that ended, by path and how.", ["endpoint", "outcome"], registry=registry
        )
        # All at once: a rate misses the first event of a series that begins with it.
        self._requests = {key: requests.labels(*key) for key in product((*Api, *Task), Outcome)}
        phases = LoopHistogram(
            "tknp_request_phase_seconds",
            "Seconds in each phase of a request's life; docs of router/lifetime.py say between which moments.",
            PHASE_BUCKETS,
            "phase",
            list(Phase),
        )
        first_token = LoopHistogram(
            "tknp_time_to_first_token_seconds",
            "Seconds from a streamed request's arrival to its first token.",
            PHASE_BUCKETS,
        )
        gaps = LoopHistogram(
            "tknp_inter_token_latency_seconds",
            "Seconds between two chunks of a stream; an engine sends one token a chunk unless it is told otherwise.",
            GAP_BUCKETS,
        )
        for histogram in (phases, first_token, gaps):
            registry.register(histogram)
        self._observe_phase = {phase: phases.series(phase).observe for phase in Phase}
        self._observe_first_token = first_token.series().observe
        self.observe_gap = gaps.series().observe
        local = Counter(
            "tknp_local_prefill_requests",
            "Requests that a decode engine prefilled itself, and why.",
            ["reason"],
            registry=registry,
        )
        self._local = {reason: local.labels(reason) for reason in LocalPrefill}
        retries = Counter(
            "tknp_retries",
            "Attempts on another engine, by the role of the one that failed.",
            ["role"],
            registry=registry,
        )
        self._retries = {role: retries.labels(role) for role in Role}
        self._retries_refused = Counter(
            "tknp_retries_refused", "Retries that the budget had nothing left for.", registry=registry
        )
        self._continuations = Counter(
            "tknp_stream_continuations",
            "Streams that another engine went on with after theirs died.",
            registry=registry,
        )
        broken = Counter(
            "tknp_stream_continuations_refused",
            "Streams whose engine died and that no other could go on with, and why.",
            ["reason"],
            registry=registry,
        )
        self._broken = {reason: broken.labels(reason) for reason in NoContinuation}
        leases = Counter(
            "tknp_kv_leases",
            "KV cache that prefill engines kept in vain, by what became of it.",
            ["end"],
            registry=registry,
        )
        self._leases = {end: leases.labels(end) for end in LeaseEnd}
        self._kv_bytes = Counter(
            "tknp_router_kv_transfer_bytes",
            "Bytes of KV cache that decode engines pulled for this router's requests; theirs are by rank.",
            registry=registry,
        )
        ProcessCollector(registry=registry)

    def leg_ended(self, engine: Engine, outcome: Outcome) -> None:
        endpoint = engine.endpoint
        ended = self._ended_legs.get((endpoint, outcome))
        if ended is None:
            ended = self._ended_legs[endpoint, outcome] = self._legs[endpoint.role].labels(endpoint.name, outcome)
        ended.inc()

    def engine_left(self, endpoint: Endpoint) -> None:
        """Drops the series of an engine that is gone for good: a pod's address hardly comes back."""
        self._legs[endpoint.role].remove_by_labels({"engine": endpoint.name})
        for outcome in Outcome:
            self._ended_legs.pop((endpoint, outcome), None)

    def retried(self, role: Role) -> None:
        self._retries[role].inc()

    def retry_refused(self) -> None:
        self._retries_refused.inc()

    def continued(self) -> None:
        self._continuations.inc()

    def not_continued(self, reason: NoContinuation) -> None:
        self._broken[reason].inc()

    def lease_ended(self, end: LeaseEnd) -> None:
        self._leases[end].inc()

    def transferred(self, kv_bytes: int, seconds: float) -> None:
        self._kv_bytes.inc(kv_bytes)
        self._observe_phase[Phase.TRANSFER](seconds)

    def request_ended(self, record: RequestRecord) -> None:
        if record.outcome is not None:
            self._requests[record.api, record.outcome].inc()
        if record.local_prefill is not None and record.attempts:
            self._local[record.local_prefill].inc()
        for phase, seconds in record.phases().items():
            self._observe_phase[phase](seconds)
        first_token = record.between(Moment.RECEIVED, Moment.FIRST_TOKEN)
        if first_token is not None:
            self._observe_first_token(first_token)


class StateCollector(Collector):
    """Gauges that are read from the state itself at each scrape, and so can't drift from it."""

    def __init__(self, pool: EnginePool, records: RecordStore, loop: asyncio.AbstractEventLoop) -> None:
        self._pool = pool
        self._records = records
        self._loop = loop  # a scrape runs on a thread

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily(
            "tknp_engine_up", "1 if the engine's last health check passed.", labels=["role", "engine"]
        )
        outstanding = GaugeMetricFamily(
            "tknp_engine_outstanding_requests",
            "Requests that the engine has from this router.",
            labels=["role", "engine"],
        )
        for engine in self._pool.engines:
            labels = [engine.endpoint.role, engine.endpoint.name]
            up.add_metric(labels, float(engine.is_up))
            outstanding.add_metric(labels, engine.num_outstanding)
        in_flight = GaugeMetricFamily(
            "tknp_requests_in_flight", "Requests in the router, by the phase that they are in.", labels=["phase"]
        )
        counts = dict.fromkeys(IN_FLIGHT.values(), 0)
        for record in self._records.in_flight():
            phase = IN_FLIGHT.get(record.last)
            if phase is not None:
                counts[phase] += 1
        for phase, count in counts.items():
            in_flight.add_metric([phase], count)
        num_tasks = len(asyncio.all_tasks(self._loop))
        tasks = GaugeMetricFamily("tknp_event_loop_tasks", "Tasks of the router's event loop.", value=num_tasks)
        yield from (up, outstanding, in_flight, tasks)
