"""An engine that costs nothing: vLLM's HTTP answers from a raw protocol, without a model, far cheaper than any router.

One TCP connection is one `EngineConnection`; it reads the request by hand and writes bytes that were made before. Each
event of a stream carries the moment at which it was written (CLOCK_MONOTONIC, nanoseconds), so that a client on the
same machine sees what its way took.
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any

import orjson

MODEL = "bench"
MARK = b'"text":"'
"""What stands in front of an event's moment."""
MOMENT_DIGITS = 18

_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
_STREAM = re.compile(rb'"stream"\s*:\s*true')
_MAX_TOKENS = re.compile(rb'"max_tokens"\s*:\s*(\d+)')
# What vLLM's NIXL connector answers the prefill leg with, for a prompt of eight blocks.
_KV_TRANSFER_PARAMS = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[*range(1000, 1008)]],
    "remote_engine_id": "3c8f6f0e-6c5b-4df1-9f60-3d4f6f2a8f10",
    "remote_request_id": "cmpl-bench",
    "remote_host": "127.0.0.1",
    "remote_port": 5600,
    "tp_size": 1,
}


def _event(token_ids: list[int] | None) -> tuple[bytes, bytes]:
    """A chunk of a stream with one event, about 200 bytes long, as what comes before and after its moment."""
    event = orjson.dumps(
        {
            "id": "cmpl-4f2a8f103c8f6f0e6c5b4df19f603d",
            "object": "text_completion",
            "created": 1_700_000_000,
            "model": MODEL,
            "choices": [
                {
                    "index": 0,
                    "text": "@",
                    "logprobs": None,
                    "finish_reason": None,
                    "stop_reason": None,
                    "token_ids": token_ids,
                }
            ],
            "usage": None,
        }
    )
    before, after = event.split(b"@")
    num_bytes = len(b"data: " + before) + MOMENT_DIGITS + len(after + b"\n\n")
    return b"%x\r\ndata: %b" % (num_bytes, before), after + b"\n\n\r\n"


_CHUNK = _event(None)
_CHUNK_WITH_IDS = _event([12345])  # as vLLM's, for whoever asks for `return_token_ids`
_DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)


def _whole(content: Any, status: bytes = b"200 OK") -> bytes:
    body = orjson.dumps(content)
    head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (status, len(body))
    return head + body


_USAGE = {"prompt_tokens": 128, "completion_tokens": 1, "total_tokens": 129}
_CHOICE = {"index": 0, "text": " x", "logprobs": None, "finish_reason": "length", "stop_reason": None}
_ANSWER = {
    "id": "cmpl-4f2a8f103c8f6f0e6c5b4df19f603d",
    "object": "text_completion",
    "created": 1_700_000_000,
    "model": MODEL,
    "choices": [_CHOICE],
    "usage": _USAGE,
}
_LOGPROBS = {"tokens": [" x"], "token_logprobs": [-0.1], "top_logprobs": [{" x": -0.1}], "text_offset": [0]}
_PREFILLED = _whole({**_ANSWER, "kv_transfer_params": _KV_TRANSFER_PARAMS})
_ANSWERED_AGAIN = _whole({**_ANSWER, "choices": [{**_CHOICE, "logprobs": _LOGPROBS}]})  # what our guard asks for
_ANSWERED = _whole(_ANSWER)
_MODELS = _whole({"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": 131_072}]})
_TRANSFER = {
    "rank": 0,
    "kv_bytes": 4096,
    "num_transfers": 1,
    "transfer_begin": 1_700_000_000.0,
    "transfer_end": 1_700_000_000.1,
}
_HEALTHY = _whole({"status": "ok", "model_path": MODEL, "served_model_name": MODEL})
_COLLECTED = b"HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n"
_MISSING = _whole({"detail": "Not Found"}, b"404 Not Found")


class FakeEngine:
    """Listens on ports of its own, so many that it poses as that many engines, whose requests it counts together;
    `interval` seconds between two events of a stream hold for streams to come."""

    def __init__(self, num_ports: int = 1) -> None:
        self.interval = 0.0
        self.num_generations = 0  # requests for tokens that came since the last reset
        self.num_open = 0  # streams under way
        self.num_cut = 0  # streams whose connection broke before their end
        self._num_ports = num_ports
        self._servers: list[asyncio.Server] = []

    @property
    def ports(self) -> list[int]:
        return [server.sockets[0].getsockname()[1] for server in self._servers]

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(f"http://127.0.0.1:{port}" for port in self.ports)

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(self._num_ports):
            server = await loop.create_server(lambda: EngineConnection(self), "127.0.0.1", 0, backlog=4096)
            self._servers.append(server)

    async def stop(self) -> None:
        for server in self._servers:
            server.close()


class EngineConnection(asyncio.Protocol):
    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._buffer = b""
        self._num_left = 0
        self._chunk = _CHUNK
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._engine.num_open -= 1
            self._engine.num_cut += 1
            self._timer = None

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end]
            length = _LENGTH.search(head)
            total = end + 4 + (int(length[1]) if length else 0)
            if len(self._buffer) < total:
                return
            body = self._buffer[end + 4 : total]
            self._buffer = self._buffer[total:]
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        if not head.endswith(b" HTTP/1.1", 0, head.find(b"\r\n") if b"\r\n" in head else len(head)):
            self._transport.close()  # a router tries whether this is HTTP/2
            return
        if not head.startswith(b"POST /v1/") or head.startswith(b"POST /v1/traces"):
            self._transport.write(self._told(head, body))
            return
        self._engine.num_generations += b'"cache_salt"' not in body  # our guard repeats requests, also after a load
        if not _STREAM.search(body):
            again = _ANSWERED_AGAIN if b'"logprobs":' in body else _ANSWERED
            self._transport.write(_PREFILLED if b'"do_remote_decode"' in body else again)
            return
        self._chunk = _CHUNK_WITH_IDS if b'"return_token_ids":true' in body else _CHUNK
        wanted = _MAX_TOKENS.search(body)
        self._num_left = int(wanted[1]) if wanted else 16
        self._transport.write(_STREAM_HEAD)
        if self._engine.interval:
            self._engine.num_open += 1
            self._next_event()
        else:
            self._transport.write(b"".join(self._next_chunk() for _ in range(self._num_left)) + _DONE)

    def _told(self, head: bytes, body: bytes) -> bytes:
        path = head.split(b" ", 2)[1]
        if path == b"/v1/models":
            return _MODELS
        if path == b"/v1/traces":
            return _COLLECTED
        if path == b"/token_parallel/transfers":
            return _whole({"transfers": dict.fromkeys(orjson.loads(body)["request_ids"], _TRANSFER)})
        # Stock vLLM tells no traits; the others are what routers ask for to see whether an engine is there.
        return _MISSING if path in (b"/kv_traits", b"/token_parallel", b"/token_parallel/room") else _HEALTHY

    def _next_event(self) -> None:
        self._num_left -= 1
        if self._num_left > 0:
            self._transport.write(self._next_chunk())
            self._timer = self._loop.call_later(self._engine.interval, self._next_event)
            return
        self._transport.write(self._next_chunk() + _DONE)
        self._timer = None
        self._engine.num_open -= 1

    def _next_chunk(self) -> bytes:
        before, after = self._chunk
        return b"%b%0*d%b" % (before, MOMENT_DIGITS, time.monotonic_ns(), after)
