"""What an engine's server tells beyond vLLM's own routes. A vLLM endpoint plugin.

Of decode engines `GET /token_parallel`, the state of the ranks, `GET /token_parallel/room`, their blocks alone, which
costs the workers nothing, `POST /token_parallel/transfers`, and metrics. Of prefill engines too `GET /kv_traits`,
`GET /kv_events` and the routes of services/release.py and services/kv_peers.py.
"""

from __future__ import annotations

import asyncio
import logging
from argparse import Namespace
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel

from services import kv_peers, release
from services.compatibility import kv_traits
from services.decode.token_parallel.options import TokenParallelOptions
from services.decode.token_parallel.rank_metrics import RankMetrics, efficiency_between
from services.engine_call import answered
from services.kv_event_source import kv_event_source

logger = logging.getLogger(f"vllm.{__name__}")

POLL_SECONDS = 2.0
"""How often the ranks are asked for the metrics; one short call to each worker."""


class RequestIds(BaseModel):
    """The body of `POST /token_parallel/transfers`."""

    request_ids: list[str]


class RankStatus:
    """Asks the engine, and keeps the last answers to compute rates from."""

    def __init__(self, engine_client: Any, options: TokenParallelOptions, tensor_parallel_size: int) -> None:
        self.engine = engine_client
        self._options = options
        self._tensor_parallel_size = tensor_parallel_size
        self._metrics = RankMetrics()
        self._previous: list[dict[str, Any]] | None = None
        self._efficiency: float | None = None
        self._poller = asyncio.create_task(self._poll()) if options.size > 1 else None

    async def read(self) -> dict[str, Any]:
        """The body of `GET /token_parallel`."""
        return {
            "token_parallel_size": self._options.size,
            "tensor_parallel_size": self._tensor_parallel_size,
            "efficiency": self._efficiency,
            "ranks": await self._ranks(),
        }

    async def room(self) -> list[dict[str, int]]:
        """Blocks and requests of each rank, by the scheduler; empty in an engine without token parallelism."""
        if self._options.size == 1:
            return []
        return list(await self.engine.collective_rpc("token_parallel_room"))

    async def transfers(self, request_ids: list[str]) -> dict[str, dict[str, Any]]:
        """The records of these requests' KV transfers; without those where there was none, or it is long ago."""
        if self._options.size == 1:
            return {}
        records: dict[str, dict[str, Any]] = (
            await self.engine.collective_rpc("token_parallel_transfers", args=(request_ids,))
        )[0]
        return records

    async def _ranks(self) -> list[dict[str, Any]]:
        if self._options.size == 1:
            return []
        return list(await self.engine.collective_rpc("token_parallel_status"))

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                ranks = await self._ranks()
            except Exception as error:  # noqa: BLE001 - whatever it was, the next poll may work
                if self.engine.errored:
                    return
                logger.warning("token parallelism: the ranks could not be asked for metrics: %s", error)
                continue
            if self._previous is not None:
                efficiency = efficiency_between(self._previous, ranks)
                # Without a step in between the last value stands.
                self._efficiency = self._efficiency if efficiency is None else efficiency
            self._previous = ranks
            self._metrics.update(ranks, self._efficiency)


class TokenParallelEndpoint:
    """Entry point `vllm.endpoint_plugins`; see vllm/plugins/endpoint_plugins/interface.py."""

    name = "tknp"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        release.attach(app)
        kv_peers.attach(app)
        app.add_api_route("/kv_traits", _read_kv_traits, methods=["GET"])
        app.add_api_route("/kv_events", _read_kv_events, methods=["GET"])
        app.add_api_route("/token_parallel", _read, methods=["GET"])
        app.add_api_route("/token_parallel/room", _read_room, methods=["GET"])
        app.add_api_route("/token_parallel/transfers", _read_transfers, methods=["POST"])

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        options = TokenParallelOptions.of(args)
        release.init(engine_client, state, args.api_key or ())
        state.kv_traits = kv_traits(engine_client.vllm_config)
        state.kv_events = kv_event_source(engine_client.vllm_config)
        state.token_parallel = RankStatus(engine_client, options, args.tensor_parallel_size)


async def _read_kv_traits(request: Request) -> dict[str, str]:
    traits: dict[str, str] = request.app.state.kv_traits
    return traits


async def _read_kv_events(request: Request) -> dict[str, Any]:
    source: dict[str, Any] | None = request.app.state.kv_events
    if source is None:
        raise HTTPException(404, "this engine publishes no KV cache events; --kv-events-config switches them on")
    return source


async def _read(request: Request) -> dict[str, Any]:
    status: RankStatus = request.app.state.token_parallel
    return await answered(status.engine, status.read())


async def _read_room(request: Request) -> dict[str, list[dict[str, int]]]:
    status: RankStatus = request.app.state.token_parallel
    return {"ranks": await answered(status.engine, status.room())}


async def _read_transfers(request: Request, wanted: RequestIds) -> dict[str, dict[str, dict[str, Any]]]:
    status: RankStatus = request.app.state.token_parallel
    return {"transfers": await answered(status.engine, status.transfers(wanted.request_ids))}
