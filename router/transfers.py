"""Asks the decode engine, after a request ended, what its hand-off moved. Never in a client's way."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import aiohttp
import orjson
from yarl import URL

from router.lifetime import Transfer
from router.types import Role

if TYPE_CHECKING:
    from router.lifetime import RequestRecord
    from router.metrics import RouterMetrics

logger = logging.getLogger(__name__)

FETCH_TIMEOUT = 5.0  # s
NUM_TRIES = 3  # the engine's workers report a transfer with their next step, which may come after the answer's end
PAUSE = 0.1  # s between tries
MAX_PENDING = 1000  # more than that means that engines are too busy to be asked


class TransferRecorder:
    """Completes records in the background and hands each to `on_complete`, whether or not the engine had an answer."""

    def __init__(
        self, session: aiohttp.ClientSession, metrics: RouterMetrics, on_complete: Callable[[RequestRecord], None]
    ) -> None:
        self._session = session
        self._metrics = metrics
        self._on_complete = on_complete
        self._tasks: set[asyncio.Task[None]] = set()

    def complete(self, record: RequestRecord) -> None:
        engine = record.engine(Role.DECODE)
        if engine is None or len(self._tasks) >= MAX_PENDING:
            self._on_complete(record)
            return
        url = URL(f"{engine.url}/token_parallel/requests/{quote(record.id, safe='')}", encoded=True)
        task = asyncio.create_task(self._fetch(record, url))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Waits for what is under way; each of it is bounded by FETCH_TIMEOUT."""
        await asyncio.gather(*self._tasks)

    async def _fetch(self, record: RequestRecord, url: URL) -> None:
        try:
            async with asyncio.timeout(FETCH_TIMEOUT):
                for _ in range(NUM_TRIES):
                    if await self._try_fetch(record, url):
                        break
                    await asyncio.sleep(PAUSE)
        except (aiohttp.ClientError, OSError, ValueError, TypeError, KeyError) as error:
            logger.warning("no record of the transfer of request %s: %r", record.id, error)
        finally:
            self._on_complete(record)

    async def _try_fetch(self, record: RequestRecord, url: URL) -> bool:
        async with self._session.get(url, allow_redirects=False) as response:
            if response.status != 200:
                return False
            told: dict[str, Any] = orjson.loads(await response.read())
        begin, end = told["transfer_begin"], told["transfer_end"]
        if begin is None or end is None:  # placed on a rank, nothing moved: a local prefill or a full prefix hit
            return True
        transfer = Transfer(int(told["rank"]), int(told["kv_bytes"]), int(told["num_transfers"]))
        record.mark_transfer(transfer, float(begin), float(end))
        self._metrics.transferred(transfer.kv_bytes, max(0.0, float(end) - float(begin)))
        return True
