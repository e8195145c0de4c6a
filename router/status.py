"""What the live page shows, as one JSON object. The engines are asked for their KV only while somebody looks."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson

from router.lifetime import IN_FLIGHT, Moment, Phase
from router.types import Outcome, Role
from tknp import __version__

if TYPE_CHECKING:
    from router.engines import Engine, EnginePool
    from router.guard import Guard
    from router.lifetime import RequestRecord
    from router.records import RecordStore
    from router.types import JsonObject

logger = logging.getLogger(__name__)

CACHE_SECONDS = 1.0  # however many pages are open, the state is read once in that time
POLL_SECONDS = 2.0  # between two looks at the engines
POLL_TIMEOUT = 1.0  # s; an engine that does not answer in time shows no KV, and holds nobody up
MAX_RECORDS = 250  # read for rates and times; about 1.5 ms
RATE_SECONDS = 10.0  # requests that ended in this time make the rates,
TIMES_SECONDS = 300.0  # and those of this time the percentiles

KV_USAGE = re.compile(rb"^vllm:kv_cache_usage_perc(?:\{[^}]*\})? ([0-9.e+-]+)$", re.MULTILINE)


class StatusBoard:
    def __init__(self, pool: EnginePool, records: RecordStore, guard: Guard, session: aiohttp.ClientSession) -> None:
        self._pool = pool
        self._records = records
        self._guard = guard
        self._session = session
        self._started_at = time.time()
        self._body = b""
        self._fresh_until = self._poll_at = 0.0  # by time.monotonic
        self._kv: dict[Engine, JsonObject] = {}
        self._refresh_task: asyncio.Task[None] | None = None

    async def read(self) -> bytes:
        """JSON, at most CACHE_SECONDS old."""
        if time.monotonic() >= self._fresh_until:
            if self._refresh_task is None or self._refresh_task.done():
                self._refresh_task = asyncio.create_task(self._refresh())
            await asyncio.shield(self._refresh_task)  # others wait for the same
        return self._body

    async def close(self) -> None:
        if self._refresh_task is not None:
            self._refresh_task.cancel()
            await asyncio.wait([self._refresh_task])

    async def _refresh(self) -> None:
        if time.monotonic() >= self._poll_at:
            self._poll_at = time.monotonic() + POLL_SECONDS
            engines = self._pool.engines
            self._kv = {engine: kv for engine, kv in self._kv.items() if engine in engines}
            await asyncio.gather(*(self._poll(engine) for engine in engines))
        self._body = orjson.dumps(self._status(), option=orjson.OPT_NON_STR_KEYS)  # enums
        self._fresh_until = time.monotonic() + CACHE_SECONDS

    async def _poll(self, engine: Engine) -> None:
        self._kv.pop(engine, None)
        if not engine.is_up:
            return
        try:
            async with asyncio.timeout(POLL_TIMEOUT):
                self._kv[engine] = await self._ranks(engine) or await self._usage(engine)
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError, TypeError, KeyError) as error:
            logger.debug("no KV use of %s: %r", engine.endpoint.name, error)

    async def _ranks(self, engine: Engine) -> JsonObject | None:
        """What a token-parallel engine tells of its ranks, None for another engine."""
        if engine.endpoint.role is not Role.DECODE:
            return None
        async with self._session.get(f"{engine.endpoint.url}/token_parallel") as response:
            if response.status != 200:
                return None
            told: JsonObject = orjson.loads(await response.read())
        # A rank's tensor-parallel workers hold the same blocks, each its heads' part: one of them stands for all.
        by_rank = {rank["rank"]: rank for rank in told["ranks"]}
        if not by_rank:
            return None
        ranks = [_rank(by_rank[number]) for number in sorted(by_rank)]
        return {"ranks": ranks, "efficiency": told.get("efficiency"), "kv_used": _mean(r["kv_used"] for r in ranks)}

    async def _usage(self, engine: Engine) -> JsonObject:
        async with self._session.get(f"{engine.endpoint.url}/metrics") as response:
            found = KV_USAGE.findall(await response.read())
        return {"ranks": [], "efficiency": None, "kv_used": _mean(map(float, found))}

    def _status(self) -> JsonObject:
        now = time.time()
        recent = self._records.recent(MAX_RECORDS)
        missing = self._pool.missing()
        return {
            "version": __version__,
            "time": now,
            "uptime_seconds": round(now - self._started_at, 1),
            "ready": not missing,
            "missing": missing,
            "models": sorted(self._pool.models()),
            "engines": [self._engine(engine) for engine in self._pool.engines],
            "in_flight": in_flight_by_phase(self._records.in_flight()),
            "rates": rates(recent, now),
            "seconds": times([record for record in recent if now - record.ended_at <= TIMES_SECONDS]),
            "guard": self._guard_status(),
        }

    def _engine(self, engine: Engine) -> JsonObject:
        return {
            "role": engine.endpoint.role,
            "name": engine.endpoint.name,
            "up": engine.is_up,
            "reason": engine.down_reason or None,
            "models": sorted(engine.models),
            "outstanding_requests": engine.num_outstanding,
            **(self._kv.get(engine) or {"ranks": [], "efficiency": None, "kv_used": None}),
        }

    def _guard_status(self) -> JsonObject:
        recent = [
            {"request_id": r.request_id, "result": r.result, "position": r.position, "time": r.at}
            for r in self._guard.recent()
        ]
        return {"share": self._guard.share, "counts": dict(self._guard.counts()), "recent": recent}


def in_flight_by_phase(records: Iterable[RequestRecord]) -> dict[str, int]:
    phases = (IN_FLIGHT.get(record.last) for record in records)
    return {**dict.fromkeys(IN_FLIGHT.values(), 0), **Counter(phase for phase in phases if phase is not None)}


def rates(newest_first: Sequence[RequestRecord], now: float) -> JsonObject:
    """Per second, over the last RATE_SECONDS, or over as much of them as the records reach back."""
    ended = [record for record in newest_first if now - record.ended_at <= RATE_SECONDS]
    reaches_back = len(ended) < len(newest_first) or len(ended) < MAX_RECORDS
    seconds = RATE_SECONDS if reaches_back else max(0.001, now - ended[-1].ended_at)
    outcomes = Counter(record.outcome for record in ended if record.outcome is not None)
    return {
        "requests": round(len(ended) / seconds, 3),
        "chunks": round(sum(record.num_chunks for record in ended) / seconds, 3),
        "by_outcome": {outcome: round(num / seconds, 3) for outcome, num in outcomes.items()},
    }


def times(records: Iterable[RequestRecord]) -> dict[str, JsonObject]:
    """Median and 95th percentile in seconds of each phase, and of the hand-over: the router's part and the pull."""
    found: dict[str, list[float]] = {}
    for record in records:
        if record.outcome is not Outcome.OK:
            continue
        phases = record.phases()
        for phase, seconds in phases.items():
            found.setdefault(phase.value, []).append(seconds)
        if Phase.HANDOFF in phases and Phase.TRANSFER in phases:
            found.setdefault("hand_over", []).append(phases[Phase.HANDOFF] + phases[Phase.TRANSFER])
        first_token = record.between(Moment.RECEIVED, Moment.FIRST_TOKEN)
        if first_token is not None:
            found.setdefault("time_to_first_token", []).append(first_token)
    return {
        name: {"p50": percentile(values, 0.5), "p95": percentile(values, 0.95), "count": len(values)}
        for name, values in found.items()
    }


def percentile(values: Sequence[float], share: float) -> float:
    """By nearest rank."""
    return round(sorted(values)[max(0, -int(-share * len(values) // 1) - 1)], 6)


def _rank(told: dict[str, Any]) -> JsonObject:
    num_blocks, num_free = int(told["num_blocks"]), int(told["num_free_blocks"])
    return {
        "rank": int(told["rank"]),
        "num_requests": int(told["num_requests"]),
        "num_blocks": num_blocks,
        "num_free_blocks": num_free,
        "kv_used": round(1 - num_free / num_blocks, 4) if num_blocks else None,
    }


def _mean(shares: Iterable[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return round(sum(known) / len(known), 4) if known else None
