"""Asks each decode engine how much KV cache its ranks have free. Between two answers router/room.py keeps count."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson

from router.room import RankKv
from router.types import Role

if TYPE_CHECKING:
    from router.engines import Engine, EnginePool
    from router.settings import RouterSettings

logger = logging.getLogger(__name__)

DEFAULT_BLOCK_SIZE = 16  # vLLM's own; for an engine that tells blocks but not their size


class KvPoller:
    """Keeps every decode engine's `load.kv` true."""

    def __init__(self, pool: EnginePool, session: aiohttp.ClientSession, settings: RouterSettings) -> None:
        self._pool = pool
        self._session = session
        self._interval = settings.kv_poll_interval
        self._timeout = settings.health_check_timeout

    async def run(self) -> None:
        """Never ends. An engine that is slow to answer does not hold up the others."""
        polls: dict[Engine, asyncio.Task[None]] = {}
        try:
            while True:
                polls = {engine: poll for engine, poll in polls.items() if not poll.done()}
                for engine in self._pool.of(Role.DECODE):
                    if engine.is_up and engine not in polls:
                        polls[engine] = asyncio.create_task(self._poll(engine))
                await asyncio.sleep(self._interval)
        finally:
            for poll in polls.values():
                poll.cancel()
            await asyncio.gather(*polls.values(), return_exceptions=True)

    async def _poll(self, engine: Engine) -> None:
        was_known = engine.load.kv.rooms is not None
        try:
            async with asyncio.timeout(self._timeout):
                ranks = await self._ask(engine)
        except TimeoutError:
            # It is busy, which is no time to believe that it has room. What was known, corrected by what was sent
            # since, stands until it answers, or is found to be down.
            logger.warning(
                "decode engine %s did not say in %g s how much KV is free", engine.endpoint.name, self._timeout
            )
            return
        except (aiohttp.ClientError, OSError, ValueError, TypeError, KeyError) as error:
            reason = f"asking for its free KV failed: {error or type(error).__name__}"
            if was_known:
                logger.warning("decode engine %s: %s", engine.endpoint.name, reason)
            engine.load.kv.forget(reason)
            return
        if ranks and engine.is_up:
            engine.load.kv.tell(ranks)
        elif engine.is_up:
            engine.load.kv.forget("it does not tell, neither at /token_parallel/room nor at /metrics")

    async def _ask(self, engine: Engine) -> list[RankKv]:
        """Empty if it does not tell."""
        url = engine.endpoint.url
        async with self._session.get(f"{url}/token_parallel/room") as response:
            raw = await response.read()
        ranks = parse_ranks(orjson.loads(raw)) if response.status == 200 else []
        if ranks or response.status not in (200, 404):
            return ranks
        async with self._session.get(f"{url}/metrics") as response:  # an engine of one rank, or a stock vLLM
            return parse_metrics(await response.text()) if response.status == 200 else []


def parse_ranks(told: Any) -> list[RankKv]:
    """The body of `GET /token_parallel/room`.

    Raises ValueError, TypeError or KeyError if it is something else.
    """
    return list(
        {
            int(status["rank"]): RankKv(
                int(status["rank"]),
                int(status["num_blocks"]),
                int(status["num_free_blocks"]),
                int(status.get("block_size", DEFAULT_BLOCK_SIZE)),
                int(status["num_requests"]),
            )
            for status in told["ranks"]
        }.values()
    )


_USAGE = re.compile(r"^vllm:kv_cache_usage_perc\{[^}]*\} (\S+)$", re.MULTILINE)
_RUNNING = re.compile(r"^vllm:num_requests_running\{[^}]*\} (\S+)$", re.MULTILINE)
_CONFIG = re.compile(r"^vllm:cache_config_info\{(.*)\} \S+$", re.MULTILINE)  # a value may hold braces
_LABEL = re.compile(r'(\w+)="([^"]*)"')


def parse_metrics(text: str) -> list[RankKv]:
    """vLLM's own metrics of an engine without token parallelism: one rank for each of its data-parallel engines."""
    configs = [dict(_LABEL.findall(labels)) for labels in _CONFIG.findall(text)]
    usages = [float(value) for value in _USAGE.findall(text)]
    running = [int(float(value)) for value in _RUNNING.findall(text)]
    if len(configs) != len(usages):
        return []
    ranks = []
    for rank, (config, usage) in enumerate(zip(configs, usages, strict=True)):
        num_blocks, block_size = config.get("num_gpu_blocks", ""), config.get("block_size", "")
        if not num_blocks.isdecimal() or not block_size.isdecimal():
            return []
        num_free = int(num_blocks) - round(usage * int(num_blocks))
        num_requests = running[rank] if len(running) == len(usages) else None
        ranks.append(RankKv(rank, int(num_blocks), num_free, int(block_size), num_requests))
    return ranks
