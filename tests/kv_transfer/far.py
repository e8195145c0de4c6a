"""One engine of tests/kv_transfer/pair.py in a process of its own, on a host of tests/e2e/hosts.py. It steps all the
time, and takes orders, a line of JSON each: requests to add. To each it answers how things are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from tests.e2e.hosts import OVER_TCP, Host
from tests.kv_transfer.pair import Engine
from tests.kv_transfer.world import world
from tests.services.building import silence_vllm, tiny_config


class FarEngine:
    """The test's end of it."""

    def __init__(self, host: Host, model: Path, role: str, num_blocks: list[int], log: Path, **extra: Any) -> None:
        """See Engine; the process writes what it has to say to `log`."""
        words = [str(model), role, json.dumps(num_blocks), host.address, json.dumps(extra)]
        environment = {**os.environ, **OVER_TCP, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        command = host.command([sys.executable, "-m", "tests.kv_transfer.far", *words])
        pipe = subprocess.PIPE
        with log.open("wb") as errors:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, env=environment)

    def add(self, name: str, prompt: list[int], max_tokens: int, params: dict[str, Any]) -> dict[str, Any]:
        """A request. Returns as `status`."""
        return self._order({"add": [name, prompt, max_tokens, params]})

    def status(self) -> dict[str, Any]:
        """`answered` and `computed` by request, `stats`, and `held`, the number of blocks that are not free."""
        return self._order({})

    def wait_for(self, name: str, seconds: float = 60.0) -> Any:
        """Until a request is answered: its `kv_transfer_params`."""
        return self._wait(lambda status: name in status["answered"], f"the answer of {name}", seconds)["answered"][name]

    def wait_idle(self, seconds: float = 60.0) -> dict[str, Any]:
        """Until every block is free."""
        return self._wait(lambda status: not status["held"], "every block being free", seconds)

    def _wait(self, condition: Any, what: str, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while not condition(status := self.status()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what} did not come about within {seconds:.0f} s: {status}")
            time.sleep(0.05)
        return status

    def _order(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        status: dict[str, Any] = json.loads(self._process.stdout.readline())
        return status

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()  # closes the pipes


def main(model: str, role: str, num_blocks: str, address: str, extra: str) -> None:
    silence_vllm()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    orders: SimpleQueue[str] = SimpleQueue()
    with (
        tempfile.TemporaryDirectory() as directory,
        world(tiny_config(Path(model), pulls_kv=True), Path(directory)),
    ):
        engine = Engine(Path(model), role, json.loads(num_blocks), address=address, **json.loads(extra))
        threading.Thread(target=_read, args=(orders,), daemon=True).start()
        while True:
            try:
                order = json.loads(orders.get_nowait())
            except Empty:
                engine.step()
                time.sleep(0.001)
                continue
            if "add" in order:
                engine.add(*order["add"])
            status = {
                "answered": engine.answered,
                "computed": engine.computed,
                "stats": engine.stats,
                "held": engine.num_usable_blocks - engine.num_free_blocks,
            }
            print(json.dumps(status), file=answers, flush=True)


def _read(orders: SimpleQueue[str]) -> None:
    for line in sys.stdin:
        orders.put(line)
    os._exit(0)  # the test is gone


if __name__ == "__main__":
    main(*sys.argv[1:])
