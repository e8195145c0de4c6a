"""One router as a process: pinned to a core, its CPU time and memory read from /proc."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

API_KEY = "sk-bench-router-0123456789"
"""What every request of the benchmark shows; ours checks it."""
START_SECONDS = 120.0
"""sglang-router waits 35 s for a tokenizer that it can't download when there is no network."""
_TICK = 1.0 / os.sysconf("SC_CLK_TCK")
_PR_SET_PDEATHSIG = 1
_PAGE = os.sysconf("SC_PAGE_SIZE")


class RouterFailedError(RuntimeError):
    """A router did not start, or ended by itself."""


def cpu_seconds(pid: int) -> float:
    """CPU time of a process since its start, all threads together, in nanoseconds' resolution."""
    return time.clock_gettime((~pid << 3) | 2)  # the clock that clock_getcpuclockid(3) names: CPUCLOCK_SCHED


def rss_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE


def busy_seconds(cores: Sequence[int]) -> float:
    """Time that these cores spent on anything, everybody's, since the machine started (/proc/stat)."""
    wanted = {f"cpu{core}" for core in cores}
    total = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *ticks = line.split()
        if name in wanted:
            user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, ticks)
            total += user + nice + system + irq + softirq
    return total * _TICK


class RouterProcess:
    """A router under measurement. `port` is where it listens."""

    def __init__(self, name: str, command: Sequence[str], port: int, core: int, log: Path) -> None:
        self.name = name
        self.port = port
        self.log = log
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "NO_PROXY": "*", "no_proxy": "*"}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                preexec_fn=lambda: _prepare(core),
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def wait_ready(self, request: bytes) -> None:
        """Returns once the router answers `request`, a body for /v1/completions, with 200. Raises RouterFailedError."""
        deadline = time.monotonic() + START_SECONDS
        url = f"http://127.0.0.1:{self.port}/v1/completions"
        why = "no answer"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while time.monotonic() < deadline:
            if not self.is_alive:
                break
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {API_KEY}"}
            ask = urllib.request.Request(url, data=request, headers=headers)
            try:
                with opener.open(ask, timeout=60) as answer:
                    answer.read()
                    return
            except urllib.error.HTTPError as error:
                why = f"status {error.code}: {error.read()[:200]!r}"
            except OSError as error:
                why = str(error)
            time.sleep(0.3)
        raise RouterFailedError(f"{self.name} did not answer a first request ({why}). Its output:\n{self.tail()}")

    def tail(self, num_lines: int = 15) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-num_lines:])

    def stop(self) -> None:
        if self.is_alive:
            self._process.terminate()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _prepare(core: int) -> None:
    """In the router's process, before its program: runtimes count the cores then, and start a thread for each."""
    os.sched_setaffinity(0, {core})
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # it ends with the benchmark, however that ends
