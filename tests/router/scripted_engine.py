"""An engine that does what a test tells it to, where a real one can't be made to.

It dies in mid-stream, stalls, talks garbage. The real engines are covered by tests/e2e.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp import web

from router.health import PROBE_ID_PREFIX
from router.types import Api, Role, Task

Behaviour = Callable[["ScriptedEngine", web.Request, "Seen"], Awaitable[web.StreamResponse]]

KV_PARAMS = {"do_remote_prefill": True, "do_remote_decode": False, "remote_engine_id": "p0", "remote_host": "127.0.0.1"}
NUM_CHUNKS = 5
MODEL = "tiny"


@dataclass
class Seen:
    """One generation request that reached the engine."""

    path: str
    headers: dict[str, str]  # names in lower case
    body: dict[str, Any]
    raw: bytes
    cancelled: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)


def chunk(index: int) -> bytes:
    return b'data: {"id":"cmpl-x","object":"text_completion","choices":[{"index":0,"text":"%d "}]}\n\n' % index


class ScriptedEngine:
    """Listens on a port of its own, which it keeps over `kill` and `revive`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, role: Role) -> None:
        self._loop = loop
        self.role = role
        self.behaviour: Behaviour = answer_prefill if role is Role.PREFILL else answer_decode
        self.seen: list[Seen] = []
        self.health_status = 200
        self.health_headers: dict[str, str] = {}
        self.can_generate = True  # for health checks; what requests get is the behaviour's
        self.num_probes = 0
        self.probe_delay = 0.0
        self.last_probe = b""
        self.aborted: list[str] = []  # ids of requests that were to be dropped
        self.released: list[str] = []  # ids of leases
        self.has_release = True  # False as of stock vLLM
        self.only_embeds = False
        self.num_slow_checks = 0  # so many health checks from now on get no answer
        self.models: list[dict[str, Any]] = [{"id": MODEL, "object": "model", "max_model_len": 4096}]
        self.kv_traits: dict[str, str] | None = None  # None as of stock vLLM, which has no such route
        self.kv_roles: Any = None  # of GET /kv_roles, None if there is no such route
        self.on_kv_roles: Callable[[], None] = lambda: None  # called before they are told
        self.token_parallel: dict[str, Any] | None = None  # None as of stock vLLM
        self.num_looks = 0  # at either
        self.is_mute = False  # looks get no answer
        self.transfers: dict[str, dict[str, Any]] = {}
        self.asked_transfers: list[list[str]] = []  # the ids in each question
        self.ranks: list[dict[str, Any]] | None = None  # None as of an engine without GET /token_parallel
        self.ranks_delay = 0.0  # s, before it tells them
        self.metrics_text = ""  # of GET /metrics
        self.kv_peer: dict[str, Any] | None = None  # of a prefill engine, None as of stock vLLM
        self.kv_peers: list[dict[str, Any]] = []  # that a decode engine was told of
        self.kv_events: bytes | None = None  # of GET /kv_events, None if there is no such route
        self.tokens: list[int] = []  # of POST /tokenize, if it is not to be a token a character
        self.port = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def name(self) -> str:
        return f"127.0.0.1:{self.port}"

    def revive(self) -> None:
        self._call(self._start())

    def kill(self) -> None:
        """At once: the port refuses connections, open ones break."""
        self._call(self._stop())

    def _call(self, work: Any) -> None:
        future: Future[None] = asyncio.run_coroutine_threadsafe(work, self._loop)
        future.result(30)

    async def _start(self) -> None:
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/kv_traits", self._kv_traits)
        app.router.add_get("/kv_roles", self._kv_roles)
        app.router.add_get("/token_parallel", self._ranks)
        app.router.add_get("/token_parallel/room", self._ranks)
        app.router.add_post("/token_parallel/transfers", self._transfers)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/kv_peer", self._kv_peer)
        app.router.add_post("/kv_peers", self._kv_peers)
        app.router.add_get("/kv_events", self._kv_events)
        app.router.add_post("/requests/{id}/abort", self._abort)
        app.router.add_post("/kv_leases/{id}/release", self._release)
        app.router.add_post("/tokenize", self._tokenize)
        for path in (*Api, Task.DETOKENIZE, Task.EMBEDDINGS):
            app.router.add_post(path, self._generate)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True, backlog=2048)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def _stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _health(self, request: web.Request) -> web.Response:
        if self.num_slow_checks > 0:
            self.num_slow_checks -= 1
            await asyncio.sleep(600)
        return web.Response(status=self.health_status, headers=self.health_headers)

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": self.models})

    async def _kv_traits(self, request: web.Request) -> web.Response:
        return web.json_response(self.kv_traits, status=404 if self.kv_traits is None else 200)

    async def _kv_roles(self, request: web.Request) -> web.Response:
        self.on_kv_roles()
        return web.json_response(self.kv_roles, status=404 if self.kv_roles is None else 200)

    async def _ranks(self, request: web.Request) -> web.Response:
        self.num_looks += 1
        if self.is_mute:
            await asyncio.sleep(600)
        await asyncio.sleep(self.ranks_delay)
        told = {"ranks": self.ranks} if self.ranks is not None else self.token_parallel
        return web.json_response(told or {}, status=404 if told is None else 200)

    async def _metrics(self, request: web.Request) -> web.Response:
        self.num_looks += 1
        return web.Response(text=self.metrics_text)

    async def _kv_peer(self, request: web.Request) -> web.Response:
        return web.json_response(self.kv_peer, status=404 if self.kv_peer is None else 200)

    async def _kv_peers(self, request: web.Request) -> web.Response:
        self.kv_peers.append(await request.json())
        return web.Response(status=202)

    async def _kv_events(self, request: web.Request) -> web.Response:
        return web.Response(body=self.kv_events, status=404 if self.kv_events is None else 200)

    async def _transfers(self, request: web.Request) -> web.Response:
        wanted = (await request.json())["request_ids"]
        self.asked_transfers.append(wanted)
        return web.json_response({"transfers": {name: told for name, told in self.transfers.items() if name in wanted}})

    async def _abort(self, request: web.Request) -> web.Response:
        self.aborted.append(request.match_info["id"])
        return web.Response(status=204)

    async def _release(self, request: web.Request) -> web.Response:
        if not self.has_release:
            return web.Response(status=404)
        self.released.append(request.match_info["id"])
        return web.Response(status=204)

    async def _tokenize(self, request: web.Request) -> web.Response:
        """What the test says, or a token a character."""
        body = await request.json()
        text = body.get("prompt")
        if "messages" in body and not text:
            text = body["messages"][-1]["content"]
        tokens = [ord(char) for char in text] if isinstance(text, str) else []
        return web.json_response({"tokens": self.tokens or tokens})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        if request.headers.get("X-Request-Id", "").startswith(PROBE_ID_PREFIX):
            self.num_probes += 1
            self.last_probe = raw
            await asyncio.sleep(self.probe_delay)
            if self.only_embeds:
                is_embedding = request.path == Task.EMBEDDINGS
                return web.json_response({"data": [{"embedding": [0.5]}]}, status=200 if is_embedding else 404)
            return web.json_response({"choices": []}, status=200 if self.can_generate else 500)
        seen = Seen(
            request.path, {name.lower(): value for name, value in request.headers.items()}, orjson.loads(raw), raw
        )
        self.seen.append(seen)
        try:
            return await self.behaviour(self, request, seen)
        except (asyncio.CancelledError, ConnectionError):
            seen.cancelled.set()
            raise
        finally:
            seen.ended.set()


async def answer_prefill(engine: ScriptedEngine, request: web.Request, seen: Seen) -> web.StreamResponse:
    return web.json_response({"id": "x", "choices": [], "kv_transfer_params": KV_PARAMS})


async def answer_decode(engine: ScriptedEngine, request: web.Request, seen: Seen) -> web.StreamResponse:
    if "kv_transfer_params" in seen.body and "tknp_request_id" in seen.body["kv_transfer_params"]:
        engine.transfers[seen.body["kv_transfer_params"]["tknp_request_id"]] = {
            "request_id": "x",
            "rank": 1,
            "kv_bytes": 4096,
            "num_transfers": 1,
            "hidden_bytes": 1024,
            "transfer_begin": time.time() - 0.25,
            "transfer_end": time.time(),
        }
    if not seen.body.get("stream"):
        text = "".join(f"{i} " for i in range(NUM_CHUNKS))
        choice = {
            "index": 0,
            "text": text,
            "finish_reason": "length",
            "message": {"role": "assistant", "content": text},
        }
        return web.json_response(
            {"id": "cmpl-x", "object": "text_completion", "created": 1, "model": MODEL, "choices": [choice]}
        )
    response = await start_stream(request)
    for index in range(NUM_CHUNKS):
        await response.write(chunk(index))
        await asyncio.sleep(0)
    await response.write(b"data: [DONE]\n\n")
    return response


async def answer_either(engine: ScriptedEngine, request: web.Request, seen: Seen) -> web.StreamResponse:
    """What an engine of both roles does: keep the KV cache if that is wanted, else answer."""
    wants_kv = seen.body.get("kv_transfer_params", {}).get("do_remote_decode")
    return await (answer_prefill if wants_kv else answer_decode)(engine, request, seen)


async def start_stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    return response


async def stall(engine: ScriptedEngine, request: web.Request, seen: Seen) -> web.StreamResponse:
    """Takes the request and never answers."""
    await asyncio.sleep(600)
    raise AssertionError


def status(code: int, body: bytes = b'{"error":{"message":"scripted","type":"x","param":null,"code":1}}') -> Behaviour:
    async def answer(engine: ScriptedEngine, request: web.Request, seen: Seen) -> web.StreamResponse:
        return web.Response(status=code, body=body, content_type="application/json")

    return answer


def raw_stream(*pieces: bytes, then: str = "close", pause: float = 0.0) -> Behaviour:
    """Sends the pieces as a stream; then "end"s it properly, "close"s the connection, or "stall"s."""

    async def answer(engine: ScriptedEngine, request: web.Request, seen: Seen) -> web.StreamResponse:
        response = await start_stream(request)
        for piece in pieces:
            await response.write(piece)
            await asyncio.sleep(pause)
        if then == "stall":
            await asyncio.sleep(600)
        if then == "close" and request.transport is not None:
            await asyncio.sleep(0.05)  # what was written is on its way before the connection breaks
            request.transport.abort()
        return response

    return answer


async def garbage(engine: ScriptedEngine, request: web.Request, seen: Seen) -> web.StreamResponse:
    return web.Response(text="<html>hello</html>", content_type="text/html")


async def hang_up(engine: ScriptedEngine, request: web.Request, seen: Seen) -> web.StreamResponse:
    """Breaks the connection without a word, as a process that is killed does."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


def raw_answer(raw: bytes) -> Behaviour:
    """Writes the bytes past the HTTP server, then closes the connection."""

    async def answer(engine: ScriptedEngine, request: web.Request, seen: Seen) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.write(raw)
        await asyncio.sleep(0.05)
        request.transport.abort()
        return web.Response()

    return answer


def slow(seconds: float) -> Behaviour:
    """The ordinary answer, after a while."""

    async def answer(engine: ScriptedEngine, request: web.Request, seen: Seen) -> web.StreamResponse:
        await asyncio.sleep(seconds)
        return await (answer_prefill if engine.role is Role.PREFILL else answer_decode)(engine, request, seen)

    return answer


@contextmanager
def engine_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """A thread that runs engines."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="scripted-engines", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()
