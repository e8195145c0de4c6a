"""Leaving without losing a request: the router's own end, and engines that are to be taken away."""

from __future__ import annotations

import asyncio
import logging
import socket
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from fastapi import Request
from fastapi.responses import JSONResponse

from router.errors import NotFound

if TYPE_CHECKING:
    from router.state import RouterState

logger = logging.getLogger(__name__)


class DrainingServer(uvicorn.Server):
    """Serves on for a while after SIGTERM while /ready already says no, so that load balancers look elsewhere before
    the port closes; then requests in flight are finished. A second signal ends the while."""

    def __init__(self, config: uvicorn.Config, drain_seconds: float) -> None:
        super().__init__(config)
        self._drain_seconds = drain_seconds
        self._is_draining = False
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._is_draining or not self._drain_seconds or not self.started or self._loop is None:
            super().handle_exit(sig, frame)
            return
        self._is_draining = True
        # A signal handler: the event loop is told, and does the rest.
        self._loop.call_soon_threadsafe(self._begin_to_drain, self._loop, sig)

    def _begin_to_drain(self, loop: asyncio.AbstractEventLoop, sig: int) -> None:
        state: RouterState = self.config.app.state.router  # type: ignore[union-attr]
        state.is_draining = True
        logger.info("draining: /ready says no, the port closes in %g s", self._drain_seconds)
        loop.call_later(self._drain_seconds, super().handle_exit, sig, None)


async def drain_engine(name: str, request: Request) -> JSONResponse:
    """The engine `host:port` finishes what it has and gets nothing new."""
    return _set_draining(request, name, True)


async def resume_engine(name: str, request: Request) -> JSONResponse:
    """Takes `drain_engine` back."""
    return _set_draining(request, name, False)


def _set_draining(request: Request, name: str, is_draining: bool) -> JSONResponse:
    state: RouterState = request.app.state.router
    engines = [engine for engine in state.pool.engines if engine.endpoint.name == name]
    if not engines:
        known = ", ".join(engine.endpoint.name for engine in state.pool.engines)
        raise NotFound(f"No engine {name!r} is known; there are: {known}.")
    for engine in engines:
        engine.is_paused = is_draining
        logger.info("engine %s is %s", name, "draining" if is_draining else "taking requests again")
    outstanding = sum(engine.num_outstanding for engine in engines)
    return JSONResponse({"engine": name, "draining": is_draining, "outstanding_requests": outstanding})
