"""Everything that lives as long as the application does, built once in its lifespan."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from router.engine_client import EngineClient
from router.engines import EnginePool
from router.handoff import Fleet
from router.health import HealthChecker
from router.leases import LeaseReleaser
from router.logs import log_request
from router.metrics import RouterMetrics, StateCollector
from router.policy import least_loaded
from router.records import RecordStore
from router.retries import RetryBudget
from router.transfers import TransferRecorder
from router.types import Outcome, Role
from router.upstream import ENGINE_HEADERS, make_session

if TYPE_CHECKING:
    from router.lifetime import RequestRecord
    from router.settings import RouterSettings


@dataclass(slots=True)
class RouterState:
    settings: RouterSettings
    registry: CollectorRegistry
    pool: EnginePool
    records: RecordStore
    metrics: RouterMetrics
    fleet: Fleet
    transfers: TransferRecorder
    is_draining: bool = False  # /ready says no; requests are still taken

    def finish(self, record: RequestRecord) -> None:
        """Counts a request that ended, and logs it once what it moved is known."""
        self.metrics.request_ended(record)
        self.records.finish(record)
        if self.settings.record_transfers and record.outcome is Outcome.OK:
            self.transfers.complete(record)
        else:
            log_request(record)


@contextlib.asynccontextmanager
async def open_state(settings: RouterSettings) -> AsyncIterator[RouterState]:
    registry = CollectorRegistry()
    pool = EnginePool(settings.endpoints, dict.fromkeys(Role, least_loaded), settings.breaker_failures)
    records = RecordStore(settings.num_request_records)
    metrics = RouterMetrics(registry)
    registry.register(StateCollector(pool, records))
    async with make_session(settings) as session:
        releaser = LeaseReleaser(session, metrics)
        transfers = TransferRecorder(session, metrics, log_request)
        client = EngineClient(settings.connect_timeout, ENGINE_HEADERS)
        checks = asyncio.create_task(HealthChecker(pool, session, settings).run())
        try:
            budget = RetryBudget(settings.retry_ratio, settings.retry_reserve)
            fleet = Fleet(settings, session, client, pool, metrics, releaser, budget)
            yield RouterState(settings, registry, pool, records, metrics, fleet, transfers)
        finally:
            checks.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await checks
            await transfers.close()
            await releaser.close()
            client.close()
