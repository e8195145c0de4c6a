"""One process of `tknp serve`, under its guard."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp

from tknp.launch.log import StageReader
from tknp.launch.plan import Role

if TYPE_CHECKING:
    from tknp.launch.plan import ChildSpec

# More than a guard needs for all its signals; then it is itself what hangs.
_STOP_TIMEOUT = 40.0
_HEALTH_TIMEOUT = aiohttp.ClientTimeout(total=5.0)


class Child:
    """Start it once, then `stop` it, whether it ended by itself or not."""

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self.stages = StageReader(spec.log)
        self._guard: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self.spec.log.parent.mkdir(parents=True, exist_ok=True)
        guard = (sys.executable, "-m", "tknp.launch.guard", str(os.getpid()))
        with self.spec.log.open("wb") as log:
            # In a session of its own: the terminal's Ctrl-C reaches `tknp serve` alone, which then stops all in order.
            self._guard = await asyncio.create_subprocess_exec(
                *guard,
                *self.spec.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(self.spec.environment),
                start_new_session=True,
            )

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return None if self._guard is None else self._guard.returncode

    @property
    def is_running(self) -> bool:
        return self._guard is not None and self._guard.returncode is None

    async def wait(self) -> int:
        """Returns when it has ended, with its exit code."""
        if self._guard is None:
            raise RuntimeError(f"{self.spec.name} was not started")
        return await self._guard.wait()

    async def is_ready(self, session: aiohttp.ClientSession) -> bool:
        try:
            async with session.get(self.spec.url + self.spec.ready_path, timeout=_HEALTH_TIMEOUT) as reply:
                if reply.status != 200 or self.spec.role is not Role.ROUTER:
                    return reply.status == 200
                # The router serves as soon as decode engines can do without the others; here all are to be there.
                engines: list[dict[str, Any]] = (await reply.json(content_type=None)).get("engines", [])
                return all(engine["up"] for engine in engines)
        except (aiohttp.ClientError, TimeoutError):
            return False

    def hurry(self) -> None:
        """While it is being stopped: don't wait for it any longer."""
        if self._guard is not None and self._guard.returncode is None:
            with suppress(ProcessLookupError):
                self._guard.terminate()

    async def stop(self) -> None:
        """Returns when neither the process nor anything that it started is left."""
        guard = self._guard
        if guard is None:
            return
        if guard.returncode is None:
            with suppress(ProcessLookupError):
                guard.terminate()
            try:
                async with asyncio.timeout(_STOP_TIMEOUT):
                    await guard.wait()
            except TimeoutError:
                guard.kill()
                await guard.wait()
        # Nothing is left in its session unless the guard itself was killed.
        for pid in session_members(guard.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def session_members(session: int) -> list[int]:
    """The processes of a session, from /proc."""
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError, ValueError):
                # After the name in brackets: state, parent, process group, session.
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == session and fields[0] != "Z":
                    members.append(int(entry.name))
    return members
