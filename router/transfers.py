"""Asks decode engines, after requests ended, what their hand-offs moved. Never in a client's way, and many at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson

from router.lifetime import Transfer
from router.types import Role

if TYPE_CHECKING:
    from router.lifetime import RequestRecord
    from router.metrics import RouterMetrics
    from router.types import Endpoint

logger = logging.getLogger(__name__)

ASK_TIMEOUT = 5.0  # s
NUM_TRIES = 3  # the engine's workers report a transfer with their next step, which may come after the answer's end
PAUSE = 0.1  # s between two questions to an engine; what ends meanwhile is asked for together
MAX_BATCH = 500  # requests in one question
MAX_PENDING = 5000  # more than that means that engines are too busy to be asked


@dataclass(slots=True)
class _Pending:
    record: RequestRecord
    num_tries: int = 0


class TransferRecorder:
    """Completes records in the background and hands each to `on_complete`, whether or not the engine had an answer."""

    def __init__(
        self, session: aiohttp.ClientSession, metrics: RouterMetrics, on_complete: Callable[[RequestRecord], None]
    ) -> None:
        self._session = session
        self._metrics = metrics
        self._on_complete = on_complete
        self._pending: dict[Endpoint, list[_Pending]] = {}
        self._num_pending = 0
        self._tasks: dict[Endpoint, asyncio.Task[None]] = {}

    def complete(self, record: RequestRecord) -> None:
        engine = record.engine(Role.DECODE)
        if engine is None or self._num_pending >= MAX_PENDING:
            self._on_complete(record)
            return
        self._num_pending += 1
        self._pending.setdefault(engine, []).append(_Pending(record))
        if engine not in self._tasks:
            self._tasks[engine] = asyncio.create_task(self._work(engine))

    async def close(self) -> None:
        """Waits for what is under way; a question is bounded by ASK_TIMEOUT, and their number by NUM_TRIES."""
        await asyncio.gather(*self._tasks.values())

    async def _work(self, engine: Endpoint) -> None:
        """Asks as long as something is pending."""
        try:
            while pending := self._pending.pop(engine, None):
                await asyncio.sleep(PAUSE)
                batch, rest = pending[:MAX_BATCH], pending[MAX_BATCH:]
                if rest:
                    self._pending.setdefault(engine, [])[:0] = rest
                told = await self._ask(engine, batch)
                for one in batch:
                    self._settle(engine, one, told)
        finally:
            del self._tasks[engine]

    def _settle(self, engine: Endpoint, one: _Pending, told: dict[str, Any] | None) -> None:
        """`told` is None if the engine will not tell, now or later."""
        one.num_tries += 1
        found = None if told is None else told.get(one.record.id)
        if found is None and told is not None and one.num_tries < NUM_TRIES:
            self._pending.setdefault(engine, []).append(one)
            return
        if found is not None:
            self._note(one.record, found)
        self._num_pending -= 1
        self._on_complete(one.record)

    async def _ask(self, engine: Endpoint, batch: list[_Pending]) -> dict[str, Any] | None:
        body = orjson.dumps({"request_ids": [one.record.id for one in batch]})
        headers = {"Content-Type": "application/json"}
        try:
            async with asyncio.timeout(ASK_TIMEOUT):
                async with self._session.post(
                    f"{engine.url}/token_parallel/transfers", data=body, headers=headers, allow_redirects=False
                ) as response:
                    answer = await response.read()
            if response.status != 200:
                return None  # stock vLLM
            told: dict[str, Any] = orjson.loads(answer)["transfers"]
        except (aiohttp.ClientError, OSError, ValueError, TypeError, KeyError) as error:
            logger.warning("%s did not tell of %d transfers: %r", engine.name, len(batch), error)
            return None
        return told

    def _note(self, record: RequestRecord, told: dict[str, Any]) -> None:
        try:
            begin, end = float(told["transfer_begin"]), float(told["transfer_end"])
            numbers = (told["rank"], told["kv_bytes"], told["num_transfers"], told.get("hidden_bytes", 0))
            transfer = Transfer(*map(int, numbers))
        except (ValueError, TypeError, KeyError) as error:
            logger.warning("what was told of the transfer of request %s can't be read: %r", record.id, error)
            return
        record.mark_transfer(transfer, begin, end)
        self._metrics.transferred(transfer.kv_bytes, max(0.0, end - begin))
