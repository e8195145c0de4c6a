"""Real services in processes of their own, which end with the test run whatever happens to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import requests

from tknp.common.ports import free_port

START_SECONDS = 300.0
"""An engine takes 25 s on two idle cores; several starting at once on a busy machine take minutes."""

MODEL_LENGTH = 1024
ENGINE_OPTIONS = (
    *("--enforce-eager", "--dtype", "float32", "--served-model-name", "tiny"),
    *("--max-model-len", str(MODEL_LENGTH), "--block-size", "32", "--max-num-seqs", "32"),
    *("--max-num-batched-tokens", "64"),  # so that most prompts take several prefill chunks
)
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # opens /collective_rpc, to look into the workers
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}


def wait_for(condition: Callable[[], Any], seconds: float, what: str, pause: float = 0.2) -> Any:
    """Polls until `condition` returns something true, and returns that; connection errors count as false."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if result := condition():
                return result
        except requests.RequestException:
            pass
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come about within {seconds:.0f} s")
        time.sleep(pause)


class Service:
    """One server process; `url` is where it listens."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log_dir: Path,
        port: int,
        env: Mapping[str, str] = {},
        address: str = "127.0.0.1",
    ) -> None:
        self.name = name
        self.port = port
        self.url = f"http://{address}:{port}"
        self.log = log_dir / f"{name}.log"
        # The guard ends the whole tree of processes, also when this test run is killed.
        guard = [sys.executable, "-m", "tknp.launch.guard", str(os.getpid())]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*guard, *command], stdout=log, stderr=log, env={**os.environ, **ENVIRONMENT, **env}
            )

    def wait_ready(self, path: str = "/health") -> None:
        """Returns once `path` answers 200; fails with the log's end if the process ends before."""

        def ready() -> bool:
            if (code := self.process.poll()) is not None:
                raise RuntimeError(f"{self.name} ended with {code} while starting:\n{self.tail()}")
            return requests.get(self.url + path, timeout=10).status_code == 200

        try:
            wait_for(ready, START_SECONDS, f"{self.name} being ready")
        except TimeoutError as error:
            raise TimeoutError(f"{error}:\n{self.tail()}") from None

    def wait_whole(self) -> None:
        """For a router: returns once it is ready and nothing is worse than it should be, as while it knows decode
        engines only."""
        self.wait_ready("/ready")
        wait_for(lambda: not self.get("/ready")["degraded"], START_SECONDS, f"{self.name} having engines of each kind")

    def server_pid(self) -> int:
        """The process that speaks HTTP: the guard's first child."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def get(self, path: str) -> Any:
        reply = requests.get(self.url + path, timeout=60)
        reply.raise_for_status()
        return reply.json()

    def post(self, path: str, body: Any, **kwargs: Any) -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=300, **kwargs)

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of a metric that carry these labels; 0 if there is none."""
        from prometheus_client.parser import text_string_to_metric_families

        text = requests.get(self.url + "/metrics", timeout=60).text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)


def tknp(*words: str) -> list[str]:
    """A command of ours."""
    return [sys.executable, "-m", "tknp", *words]


def kv_event_ports() -> dict[str, str]:
    """Where an engine is to publish its KV cache events."""
    return {name: f"tcp://*:{free_port()}" for name in ("endpoint", "replay_endpoint")}


def pulling_back(ports: Mapping[str, str]) -> tuple[str, ...]:
    """Options of an engine behind a router with --pull-back-tokens."""
    config = {"enable_kv_cache_events": True, "publisher": "zmq", "topic": "kv", **ports}
    return "--kv-both", "--kv-events-config", json.dumps(config)


def start_plain(model: Path, log_dir: Path, *options: str, name: str = "plain") -> Service:
    """An ordinary vLLM server, without anything of ours switched on."""
    port = free_port()
    module = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
    where = ("--model", str(model), "--host", "127.0.0.1", "--port", str(port))
    return Service(name, [*module, *where, *ENGINE_OPTIONS, *options], log_dir, port)


def start_prefill(model: Path, log_dir: Path, *options: str, name: str = "prefill") -> Service:
    port = free_port()
    return Service(name, tknp("prefill", str(model), "--port", str(port), *ENGINE_OPTIONS, *options), log_dir, port)


def start_decode(model: Path, log_dir: Path, token_parallel_size: int, *options: str, name: str = "decode") -> Service:
    port = free_port()
    words = ("decode", str(model), "--port", str(port), "--token-parallel-size", str(token_parallel_size))
    return Service(name, tknp(*words, *ENGINE_OPTIONS, *options), log_dir, port)


def start_router(
    log_dir: Path, prefill: Sequence[Service], decode: Sequence[Service], *options: str, name: str = "router"
) -> Service:
    port = free_port()
    engines = [f"--prefill-urls={','.join(p.url for p in prefill)}", f"--decode-urls={','.join(d.url for d in decode)}"]
    return Service(name, tknp("router", "--port", str(port), *engines, *options), log_dir, port)
