"""A client that costs little: one connection, on which it asks again and again and takes the time of every event."""

from __future__ import annotations

import asyncio
import time
from array import array
from dataclasses import dataclass, field
from typing import Any

import httptools

from bench.router.engine import MARK, MOMENT_DIGITS

_DONE = b"data: [DONE]"


@dataclass
class Samples:
    """What all clients of one load saw; times in nanoseconds."""

    first_token: array[int] = field(default_factory=lambda: array("q"))  # from asking to the first event
    delivery: array[int] = field(default_factory=lambda: array("q"))  # from the engine's write of an event to here
    num_requests: int = 0
    num_events: int = 0
    num_reads: int = 0  # pieces of body in which the events came
    errors: dict[str, int] = field(default_factory=dict)

    def failed(self, reason: str) -> None:
        self.errors[reason] = self.errors.get(reason, 0) + 1


class StreamClient(asyncio.Protocol):
    """One connection to one router. `ask` sends the request and returns when its stream ended or broke."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self._ended: asyncio.Future[str | None] | None = None
        self._transport: Any = None
        self._parser = httptools.HttpResponseParser(self)
        self._asked_at = 0
        self._num_events = 0
        self._is_done = False
        self._rest = b""

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    async def ask(self, request: bytes, num_events: int) -> None:
        """Counts the answer as an error unless it is a 200 with all events and [DONE], or, for none, a whole one."""
        self._ended = asyncio.get_running_loop().create_future()
        self._num_events, self._is_done, self._rest = 0, False, b""
        self._asked_at = time.monotonic_ns()
        self._transport.write(request)
        reason = await self._ended
        self._samples.num_requests += 1
        if reason is None and (status := self._parser.get_status_code()) != 200:
            reason = f"status {status}"
        if reason is None and (self._num_events != num_events or self._is_done != (num_events > 0)):
            reason = "incomplete answer"
        if reason is not None:
            self._samples.failed(reason)
        self._parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._end("connection broke")

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._end("not HTTP")
            self._transport.abort()

    # httptools' callbacks

    def on_body(self, body: bytes) -> None:
        now = time.monotonic_ns()
        samples = self._samples
        samples.num_reads += 1
        if self._rest:
            body = self._rest + body
        at = body.find(MARK)
        end = 0
        while at >= 0 and len(body) >= at + len(MARK) + MOMENT_DIGITS:
            begin = at + len(MARK)
            end = begin + MOMENT_DIGITS
            moment = body[begin:end]
            if not moment.isdigit():
                break
            if not self._num_events:
                samples.first_token.append(now - self._asked_at)
            samples.delivery.append(now - int(moment))
            self._num_events += 1
            samples.num_events += 1
            at = body.find(MARK, end)
        self._is_done = self._is_done or _DONE in body
        self._rest = body[max(end, len(body) - len(MARK) - MOMENT_DIGITS) :]  # an event may go on in the next piece

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self._transport.close()
        self._end(None)

    def _end(self, reason: str | None) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(reason)
