"""Everything that lives as long as the application does, built once in its lifespan."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from router.access import Access
from router.admission import Admission
from router.admission_metrics import AdmissionCollector, AdmissionMetrics
from router.choice import Chooser
from router.discovery import make_discovery
from router.engines import EnginePool
from router.guard import make_guard
from router.handoff import Fleet
from router.health import HealthChecker
from router.hosts import EngineHosts
from router.introductions import Introductions
from router.kv_events import KvEventWatcher
from router.kv_poll import KvPoller
from router.leases import LeaseReleaser
from router.load_metrics import LoadCollector
from router.logs import log_request
from router.membership import Membership
from router.metrics import RouterMetrics, StateCollector
from router.pull_back import PullBack
from router.records import RecordStore
from router.retries import RetryBudget
from router.role_flips import RoleFlips
from router.status import StatusBoard
from router.token_ids import PromptTokenizer
from router.tracing import make_tracing
from router.transfers import TransferRecorder
from router.types import Outcome
from router.upstream import make_session

if TYPE_CHECKING:
    from router.guard import Guard
    from router.lifetime import RequestRecord
    from router.settings import RouterSettings
    from router.tracing import Tracing


@dataclass(slots=True)
class RouterState:
    settings: RouterSettings
    registry: CollectorRegistry
    pool: EnginePool
    records: RecordStore
    metrics: RouterMetrics
    fleet: Fleet
    transfers: TransferRecorder
    access: Access
    admission: Admission
    tracing: Tracing
    guard: Guard
    board: StatusBoard
    membership: Membership
    is_draining: bool = False  # /ready says no; requests are still taken

    def finish(self, record: RequestRecord) -> None:
        """Counts a request that ended, and logs it once what it moved is known."""
        self.metrics.request_ended(record)
        self.records.finish(record)
        is_transferred = record.outcome is Outcome.OK and record.local_prefill is None
        if self.settings.record_transfers and is_transferred:
            self.transfers.complete(record)
        else:
            _conclude(self.tracing, record)


def _conclude(tracing: Tracing, record: RequestRecord) -> None:
    """The last thing done for a request: its log line and its spans."""
    log_request(record)
    tracing.export(record)


@contextlib.asynccontextmanager
async def open_state(settings: RouterSettings) -> AsyncIterator[RouterState]:
    registry = CollectorRegistry()
    pool = EnginePool(settings.endpoints, Chooser(settings), settings.breaker_failures)
    records = RecordStore(settings.num_request_records)
    metrics = RouterMetrics(registry)
    registry.register(StateCollector(pool, records, asyncio.get_running_loop()))
    registry.register(LoadCollector(pool, settings))
    admission_metrics = AdmissionMetrics(registry)
    access = Access(admission_metrics)
    admission = Admission(settings, admission_metrics)
    registry.register(AdmissionCollector(admission))
    async with access.keys_from(settings.api_keys_file), make_session(settings) as session:
        releaser = LeaseReleaser(session, metrics)
        tracing = make_tracing(settings)
        guard = make_guard(settings, session, pool, registry)
        board = StatusBoard(pool, records, guard, session)
        hosts = EngineHosts(settings.endpoints, settings.allowed_engine_hosts)
        membership = Membership(pool, records, hosts, metrics)
        introductions = Introductions(pool, session, settings, hosts)
        discovery = make_discovery(settings, registry)
        pull_back = PullBack(pool, session, settings, hosts, releaser, registry)
        transfers = TransferRecorder(session, metrics, partial(_conclude, tracing))
        watchers = [
            asyncio.create_task(work)
            for work in (
                HealthChecker(pool, session, settings).run(),
                KvPoller(pool, session, settings).run(),
                introductions.run(),
                pull_back.run(),
                KvEventWatcher(pool, session, pool.chooser.roles_with_prefixes).run(),
                membership.run(),
                discovery.run(membership.found),
                RoleFlips(pool, membership, session, settings, registry).run(),
            )
        ]
        try:
            fleet = Fleet(
                settings,
                session,
                pool,
                metrics,
                releaser,
                RetryBudget(settings.retry_ratio, settings.retry_reserve),
                PromptTokenizer(pool, session),
                hosts,
                introductions,
                pull_back,
            )
            yield RouterState(
                settings,
                registry,
                pool,
                records,
                metrics,
                fleet,
                transfers,
                access,
                admission,
                tracing,
                guard,
                board,
                membership,
            )
        finally:
            for watcher in watchers:
                watcher.cancel()
            for watcher in watchers:
                with contextlib.suppress(asyncio.CancelledError):
                    await watcher
            await board.close()
            await guard.close()
            await transfers.close()
            await releaser.close()
            await tracing.close()
