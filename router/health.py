"""Active health checks: who is up, noticed fast when an engine dies and when it comes back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

import aiohttp
import orjson

if TYPE_CHECKING:
    from router.engines import Engine, EnginePool
    from router.settings import RouterSettings
    from router.types import JsonObject

logger = logging.getLogger(__name__)


class Unhealthy(Exception):
    """The engine answered, and the answer says that it can't serve."""


class HealthChecker:
    """Keeps every engine's `is_up`, `models` and `kv_traits` true."""

    def __init__(self, pool: EnginePool, session: aiohttp.ClientSession, settings: RouterSettings) -> None:
        self._pool = pool
        self._session = session
        self._settings = settings

    async def run(self) -> None:
        """Never ends."""
        async with asyncio.TaskGroup() as group:
            for engine in self._pool.engines:
                group.create_task(self._watch(engine))

    async def _watch(self, engine: Engine) -> None:
        num_missed = 0
        models_until = 0.0
        now = asyncio.get_running_loop().time
        while True:
            engine.suspected.clear()
            begin = now()
            try:
                async with asyncio.timeout(self._settings.health_check_timeout):
                    await self._check_alive(engine)
                    models, kv_traits = engine.models, engine.kv_traits
                    if not engine.is_up or now() >= models_until:
                        models, kv_traits = await self._fetch_models(engine), await self._fetch_kv_traits(engine)
                        models_until = now() + self._settings.models_interval
                engine.mark_up(models, kv_traits)
                num_missed = 0
            except TimeoutError:
                # If even the timer came late, this process is what is overloaded, and the answer may lie unread.
                num_missed += now() - begin < 1.5 * self._settings.health_check_timeout
                if num_missed >= self._settings.health_check_failures:
                    engine.mark_down(f"{num_missed} health checks timed out in a row")
            except aiohttp.ClientConnectorError as error:
                engine.mark_down(f"it can't be reached: {error.os_error.strerror or error}")
            except (aiohttp.ClientError, OSError, Unhealthy) as error:
                engine.mark_down(str(error) or type(error).__name__)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(engine.suspected.wait(), self._settings.health_check_interval)

    async def _check_alive(self, engine: Engine) -> None:
        async with self._session.get(f"{engine.endpoint.url}/health") as response:
            if response.status != 200:
                raise Unhealthy(f"/health answered with status {response.status}")

    async def _fetch_kv_traits(self, engine: Engine) -> dict[str, str]:
        async with self._session.get(f"{engine.endpoint.url}/kv_traits") as response:
            raw = await response.read()
        if response.status == 404:
            return {}  # stock vLLM
        try:
            return {str(name): str(value) for name, value in orjson.loads(raw).items()}
        except (ValueError, AttributeError) as error:
            raise Unhealthy(f"/kv_traits answered with status {response.status} and no traits") from error

    async def _fetch_models(self, engine: Engine) -> dict[str, JsonObject]:
        async with self._session.get(f"{engine.endpoint.url}/v1/models") as response:
            raw = await response.read()
        try:
            models = {str(card["id"]): card for card in orjson.loads(raw)["data"]}
        except (ValueError, TypeError, KeyError) as error:
            raise Unhealthy(f"/v1/models answered with status {response.status} and no list of models") from error
        if not models:
            raise Unhealthy("/v1/models lists no model")
        return models
