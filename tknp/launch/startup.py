"""Waiting for engines and router, with a line for each stage of each engine."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from tknp.launch.plan import Role

if TYPE_CHECKING:
    from collections.abc import Sequence

    import aiohttp

    from tknp.launch.child import Child
    from tknp.launch.console import Console

_POLL_INTERVAL = 0.5  # seconds
_QUIET_INTERVAL = 15.0  # seconds without news after which the user is told what is being waited for
_READY = "ready"


class StartupError(Exception):
    """A process ended, or the time was up; the user has been told."""


class Startup:
    def __init__(self, children: Sequence[Child], console: Console, timeout: float) -> None:
        self._children = children
        self._console = console
        self._timeout = timeout  # seconds
        self._stages: dict[Child, str] = {}
        self._last_news = time.monotonic()

    async def wait(self, session: aiohttp.ClientSession) -> None:
        """Returns when every process is ready.

        Raises:
            StartupError: one of them ended, or not all were ready in time.
        """
        while waiting := [child for child in self._children if self._stages.get(child) != _READY]:
            for child in self._children:
                if child.exit_code is not None:
                    self._console.death(child, f"while {self._stages.get(child, 'starting')}")
                    raise StartupError
            for child in waiting:
                self._tell(child, await self._stage(child, session))
            if time.monotonic() - self._last_news > _QUIET_INTERVAL:
                self._remind(waiting)
            if self._console.elapsed > self._timeout:
                self._console.news(f"Not all was ready within --startup-timeout, {self._timeout:g} s")
                self._remind(waiting)
                raise StartupError
            await asyncio.sleep(_POLL_INTERVAL)

    async def _stage(self, child: Child, session: aiohttp.ClientSession) -> str:
        if await child.is_ready(session):
            return _READY
        if child.spec.role is Role.ROUTER:
            return "waiting for the engines"
        return child.stages.read()

    def _tell(self, child: Child, stage: str) -> None:
        if self._stages.get(child) != stage:
            self._stages[child] = stage
            self._last_news = time.monotonic()
            self._console.news(f"{child.spec.name}: {stage}")

    def _remind(self, waiting: Sequence[Child]) -> None:
        self._last_news = time.monotonic()
        for child in waiting:
            if child.spec.role is not Role.ROUTER or len(waiting) == 1:
                last_line = f" ({child.stages.last_line[:100]})" if child.stages.last_line else ""
                self._console.news(f"{child.spec.name}: still {self._stages[child]}{last_line}")
