"""Everything that lives as long as the application does, built once in its lifespan."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from router.engines import EnginePool
from router.guard import make_guard
from router.handoff import Fleet
from router.health import HealthChecker
from router.leases import LeaseReleaser
from router.logs import log_request
from router.metrics import RouterMetrics, StateCollector
from router.policy import least_loaded
from router.records import RecordStore
from router.status import StatusBoard
from router.tracing import make_tracing
from router.transfers import TransferRecorder
from router.types import Outcome, Role
from router.upstream import make_session

if TYPE_CHECKING:
    from router.guard import Guard
    from router.lifetime import RequestRecord
    from router.settings import RouterSettings
    from router.tracing import Tracing


@dataclass(frozen=True, slots=True)
class RouterState:
    settings: RouterSettings
    registry: CollectorRegistry
    pool: EnginePool
    records: RecordStore
    metrics: RouterMetrics
    fleet: Fleet
    transfers: TransferRecorder
    tracing: Tracing
    guard: Guard
    board: StatusBoard

    def finish(self, record: RequestRecord) -> None:
        """Counts a request that ended, and logs it once what it moved is known."""
        self.metrics.request_ended(record)
        self.records.finish(record)
        if self.settings.record_transfers and record.outcome is Outcome.OK:
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
    pool = EnginePool(settings.endpoints, dict.fromkeys(Role, least_loaded))
    records = RecordStore(settings.num_request_records)
    metrics = RouterMetrics(registry)
    registry.register(StateCollector(pool, records))
    async with make_session(settings) as session:
        releaser = LeaseReleaser(session, pool)
        tracing = make_tracing(settings)
        guard = make_guard(settings, session, pool, registry)
        board = StatusBoard(pool, records, guard, session)
        transfers = TransferRecorder(session, metrics, partial(_conclude, tracing))
        checks = asyncio.create_task(HealthChecker(pool, session, settings).run())
        try:
            fleet = Fleet(settings, session, pool, metrics, releaser)
            yield RouterState(settings, registry, pool, records, metrics, fleet, transfers, tracing, guard, board)
        finally:
            checks.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await checks
            await board.close()
            await guard.close()
            await transfers.close()
            await releaser.close()
            await tracing.close()
