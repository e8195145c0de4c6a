"""Engines that are killed, stopped and started again on the same port."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import requests

from tests.e2e.processes import ENGINE_OPTIONS, Service, tknp
from tknp.common.ports import free_port
from tknp.launch.guard import descendants


class SoakEngine:
    """One engine over all its lives."""

    def __init__(self, name: str, command: Callable[[int], list[str]], log_dir: Path) -> None:
        self.name = name
        self.num_kills = 0
        self._command = command
        self._log_dir = log_dir
        self._port = free_port()
        self.service = self._start()

    @classmethod
    def prefill(cls, name: str, model: Path, log_dir: Path, *options: str) -> SoakEngine:
        return cls(
            name, lambda port: tknp("prefill", str(model), "--port", str(port), *ENGINE_OPTIONS, *options), log_dir
        )

    @classmethod
    def decode(cls, name: str, model: Path, log_dir: Path, token_parallel_size: int, *options: str) -> SoakEngine:
        options = ("--token-parallel-size", str(token_parallel_size), *ENGINE_OPTIONS, *options)
        return cls(name, lambda port: tknp("decode", str(model), "--port", str(port), *options), log_dir)

    @property
    def url(self) -> str:
        return self.service.url

    def is_healthy(self) -> bool:
        try:
            return requests.get(self.url + "/health", timeout=5).status_code == 200
        except requests.RequestException:
            return False

    def kill(self) -> None:
        """SIGKILL to every process of it at once, as when the machine goes down. Returns when a new one serves."""
        self._kill(self._processes())

    def kill_one(self, rng: random.Random) -> str:
        """SIGKILL to one of its engine core and workers, as when memory ends: the rest of it must end by itself.

        Returns which one, when a new engine serves.
        """
        names = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0] for pid in self._processes()}
        pid = rng.choice(sorted(pid for pid, name in names.items() if name.startswith(b"VLLM::")))
        self._kill({pid})
        return names[pid].decode()

    def _kill(self, pids: set[int]) -> None:
        self.num_kills += 1
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.service.process.wait(timeout=60)
        self.service = self._start()
        self.service.wait_ready()

    def pause(self, seconds: float) -> None:
        """SIGSTOP to every process of it: connections stay open and nothing answers."""
        pids = self._processes()
        try:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
            time.sleep(seconds)
        finally:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def held(self) -> list[str]:
        """What keeps KV on it, a line each."""
        found = []
        if usage := self.service.metric("vllm:kv_cache_usage_perc"):
            found.append(f"{self.name}: {usage:.2%} of its blocks in use")
        for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
            if count := self.service.metric(name):
                found.append(f"{self.name}: {name} is {count:g}")
        return found

    def stop(self) -> None:
        self.service.stop()

    def _processes(self) -> set[int]:
        """All but the guard, which then tells how the engine ended."""
        return descendants(self.service.process.pid)

    def _start(self) -> Service:
        name = f"{self.name}-{self.num_kills}" if self.num_kills else self.name
        return Service(name, self._command(self._port), self._log_dir, self._port)
