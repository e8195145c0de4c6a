"""The router as a process of its own, as `tknp router` starts it."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import orjson
import pytest

from tests.router.running import wait_for
from tknp.common.ports import free_port

PROGRAM = "from router.app import run; from router.settings import RouterSettings; run(RouterSettings())"


@contextmanager
def process(port: int) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "TKNP_ROUTER_PORT": str(port), "TKNP_ROUTER_DECODE_URLS": "http://127.0.0.1:9"}
    with subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, stderr=subprocess.PIPE) as running:
        try:
            yield running
        finally:
            running.kill()


def is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_a_signal_and_logs_json(number: signal.Signals) -> None:
    port = free_port()
    with process(port) as running:
        wait_for(lambda: is_healthy(port))
        running.send_signal(number)
        _, log = running.communicate(timeout=30)
    assert running.returncode in (0, -number)
    lines = [orjson.loads(line) for line in log.splitlines()]  # no traceback among them
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)


def test_a_port_in_use_is_an_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with process(taken.getsockname()[1]) as running:
            _, log = running.communicate(timeout=30)
    assert running.returncode == 3
    assert b"address already in use" in log
