"""Which parts in a hand-off an engine can take, by its own word (services/release.py)."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import aiohttp
import orjson

if TYPE_CHECKING:
    from router.engines import Engine

logger = logging.getLogger(__name__)

ASK_TIMEOUT = 5.0  # s


async def kv_roles(session: aiohttp.ClientSession, engine: Engine) -> set[str] | None:
    """What it says at GET /kv_roles; nothing of an engine that does not say, such as a stock vLLM server; None if it
    could not be asked."""
    try:
        async with asyncio.timeout(ASK_TIMEOUT):
            async with session.get(f"{engine.endpoint.url}/kv_roles", allow_redirects=False) as response:
                raw = await response.read()
        if response.status == 404:
            return set()
        response.raise_for_status()
        return set(orjson.loads(raw)["roles"])
    except (TimeoutError, aiohttp.ClientError, OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("%s could not be asked for the roles that it can take: %r", engine.endpoint.name, error)
        return None
