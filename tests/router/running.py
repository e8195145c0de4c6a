"""A router under test: the real one, on a real socket, in a thread of its own."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import orjson
import uvicorn

from router.app import make_server
from router.settings import RouterSettings
from router.state import RouterState
from router.types import Role
from tests.router.scripted_engine import MODEL, ScriptedEngine

WAIT = 20.0  # s; the machine may be busy


def wait_for(condition: Callable[[], Any], seconds: float = WAIT) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.01)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.json()["error"]
        assert set(found) >= {"message", "type", "param", "code"}
        return found


@dataclass
class RunningRouter:
    server: uvicorn.Server
    port: int

    @property
    def state(self) -> RouterState:
        state: RouterState = self.server.config.app.state.router  # type: ignore[union-attr]
        return state

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def call(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        """One request on a connection of its own; a body that is not bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        raw = body if body is None or isinstance(body, bytes) else orjson.dumps(body)
        try:
            connection.request(method, path, raw, {"Content-Type": "application/json", **(headers or {})})
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def complete(self, headers: dict[str, str] | None = None, **fields: Any) -> Answer:
        return self.call("POST", "/v1/completions", {"model": MODEL, "prompt": "hi", **fields}, headers)

    def chat(self, **fields: Any) -> Answer:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **fields}
        return self.call("POST", "/v1/chat/completions", body)

    def open_stream(self, **fields: Any) -> socket.socket:
        """A raw connection on which a streamed completion was asked for; the caller closes it."""
        raw = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        self.ask_stream(raw, **fields)
        return raw

    def ask_stream(self, raw: socket.socket, **fields: Any) -> None:
        """On a connection that is there already."""
        body = orjson.dumps({"model": MODEL, "prompt": "hi", "stream": True, **fields})
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )

    def metric(self, name: str, **labels: str) -> float:
        """0.0 if the sample does not exist yet."""
        return self.state.registry.get_sample_value(name, labels) or 0.0

    def record(self, answer: Answer) -> dict[str, Any]:
        found: dict[str, Any] = self.call("GET", f"/requests/{answer.headers['x-request-id']}").json()
        return found

    def is_idle(self) -> bool:
        return not self.state.records.in_flight() and not any(e.num_outstanding for e in self.state.pool.engines)


@contextmanager
def running_router(engines: list[ScriptedEngine], *, wait_ready: bool = True, **fields: Any) -> Iterator[RunningRouter]:
    fields = {"health_check_interval": 0.1, "shutdown_timeout": 5.0, **fields}
    settings = RouterSettings(
        port=0,
        prefill_urls=tuple(e.url for e in engines if e.role is Role.PREFILL),
        decode_urls=tuple(e.url for e in engines if e.role is Role.DECODE),
        **fields,
    )
    server = make_server(settings)
    thread = threading.Thread(target=server.run, name="router", daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        router = RunningRouter(server, server.servers[0].sockets[0].getsockname()[1])
        if wait_ready:
            wait_for(lambda: all(e.is_up for e in router.state.pool.engines))
        yield router
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the router did not stop"
