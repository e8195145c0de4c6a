"""Active health checks: who is up, noticed fast when an engine dies and when it comes back.

An engine whose server answers may still generate nothing, because its workers hang. So what counts is one generated
token: before an engine is up, when a request failed on it, and now and then while no request ends well on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from typing import TYPE_CHECKING

import aiohttp
import orjson

from router.types import Api, Task

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from router.engines import Engine, EnginePool
    from router.settings import RouterSettings
    from router.types import JsonObject

logger = logging.getLogger(__name__)

NO_ROUTE = (404, 405, 501)  # with these vLLM says that its model does not generate
PROBE_ID_PREFIX = "tknp-health-"


class Unhealthy(Exception):
    """The engine answered, and the answer says that it can't serve."""


class HealthChecker:
    """Keeps every engine's `is_up`, `models`, `kv_traits` and circuit breaker true."""

    def __init__(self, pool: EnginePool, session: aiohttp.ClientSession, settings: RouterSettings) -> None:
        self._pool = pool
        self._session = session
        self._settings = settings

    async def run(self) -> None:
        """Never ends."""
        await self._pool.for_each(lambda engine: EngineWatch(engine, self._session, self._settings).run())


class EngineWatch:
    """The checks of one engine."""

    def __init__(self, engine: Engine, session: aiohttp.ClientSession, settings: RouterSettings) -> None:
        self._engine = engine
        self._session = session
        self._settings = settings
        self._now = asyncio.get_running_loop().time
        self._num_missed = 0
        self._models_until = 0.0
        self._proved_until = 0.0

    async def run(self) -> None:
        """Never ends."""
        while True:
            is_suspected = self._engine.suspected.is_set()
            self._engine.suspected.clear()
            await self._check(is_suspected)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.health_check_interval):
                    await self._engine.suspected.wait()

    async def _check(self, is_suspected: bool) -> None:
        engine, settings = self._engine, self._settings
        try:
            async with self._patience(settings.health_check_timeout):
                await self._check_alive()
                models, kv_traits = engine.models, engine.kv_traits
                if not engine.is_up or self._now() >= self._models_until:
                    models, kv_traits = await self._fetch_models(), await self._fetch_kv_traits()
                    self._models_until = self._now() + settings.models_interval
            if is_suspected or not engine.is_up or engine.breaker.is_open or self._now() >= self._proved_until:
                async with self._patience(settings.generation_check_timeout):
                    await self._generate(next(iter(models)))
                engine.proved()
                self._proved_until = self._now() + settings.generation_check_interval
            engine.mark_up(models, kv_traits)
            self._num_missed = 0
        except TimeoutError:
            if self._num_missed >= settings.health_check_failures:
                engine.mark_down(f"{self._num_missed} health checks timed out in a row")
        except aiohttp.ClientConnectorError as error:
            engine.mark_down(f"it can't be reached: {error.os_error.strerror or error}")
        except (aiohttp.ClientError, OSError, Unhealthy) as error:
            engine.mark_down(str(error) or type(error).__name__)

    @contextlib.asynccontextmanager
    async def _patience(self, seconds: float) -> AsyncIterator[None]:
        """A limit that counts as missed when it is passed, unless something else explains that."""
        begin, num_progress = self._now(), self._engine.num_progress
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            # If even the timer came late, this process is what is overloaded, and the answer may lie unread. And an
            # engine that works on other requests only has a long queue.
            is_late = self._now() - begin >= 1.5 * seconds
            self._num_missed += not is_late and self._engine.num_progress == num_progress
            raise

    async def _check_alive(self) -> None:
        async with self._session.get(f"{self._engine.endpoint.url}/health", allow_redirects=False) as response:
            if response.status != 200:
                raise Unhealthy(f"/health answered with status {response.status}")

    async def _generate(self, model: str) -> None:
        """One token; of an engine whose model only embeds, which has no such route, one embedding.

        A prompt that is short and never the same has no part in a prefix cache.
        """
        request_id = f"{PROBE_ID_PREFIX}{uuid.uuid4().hex}"
        body = {"model": model, "prompt": request_id, "max_tokens": 1, "temperature": 0}
        status, answer = await self._ask(Api.COMPLETIONS, body, request_id)
        if status == 200 and b'"choices"' in answer:
            return
        if status in NO_ROUTE:
            embedding = await self._ask(Task.EMBEDDINGS, {"model": model, "input": request_id}, request_id)
            if embedding[0] == 200 and b'"embedding"' in embedding[1]:
                return
        said = answer[:200].decode(errors="replace")
        raise Unhealthy(f"it answers, but generates nothing: status {status}, {said}")

    async def _ask(self, path: str, body: JsonObject, request_id: str) -> tuple[int, bytes]:
        """Status and body of the answer."""
        headers = {"Content-Type": "application/json", "X-Request-Id": request_id}
        url = self._engine.endpoint.url + path
        async with self._session.post(url, data=orjson.dumps(body), headers=headers, allow_redirects=False) as response:
            return response.status, await response.read()

    async def _fetch_kv_traits(self) -> dict[str, str]:
        async with self._session.get(f"{self._engine.endpoint.url}/kv_traits", allow_redirects=False) as response:
            raw = await response.read()
        if response.status == 404:
            return {}  # stock vLLM
        try:
            return {str(name): str(value) for name, value in orjson.loads(raw).items()}
        except (ValueError, AttributeError) as error:
            raise Unhealthy(f"/kv_traits answered with status {response.status} and no traits") from error

    async def _fetch_models(self) -> dict[str, JsonObject]:
        async with self._session.get(f"{self._engine.endpoint.url}/v1/models", allow_redirects=False) as response:
            raw = await response.read()
        try:
            models = {str(card["id"]): card for card in orjson.loads(raw)["data"]}
        except (ValueError, TypeError, KeyError) as error:
            raise Unhealthy(f"/v1/models answered with status {response.status} and no list of models") from error
        if not models:
            raise Unhealthy("/v1/models lists no model")
        return models
