"""An engine's answer on its way to the client, byte for byte.

Of a stream nothing is kept but an event that has not ended yet: an engine that dies in the middle of one then leaves
the client a stream of whole events, to which the error can be added.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

import orjson

from router.continuation import AnswerEnded
from router.errors import EngineFailure, EngineRejected, FailureKind
from router.lifetime import Moment
from router.tap import pump

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    import aiohttp

    from router.cached_usage import CachedUsage
    from router.continuation import Transcript
    from router.engines import Engine
    from router.lifetime import RequestRecord
    from router.reply import Reply
    from router.types import Endpoint

EVENT_ENDS = (b"\n\n", b"\r\n\r\n")
DONE = b"data: [DONE]"
ERROR = b'data: {"error"'  # JSON escapes the quotes, so no token's text can hold this
# An event of vLLM's without anything of the answer: chat's first one, or text that may become a stop string.
EMPTY = re.compile(
    rb'"choices":\[\{"index":\d+,(?:"text":""|"delta":\{(?:"role":"\w+",?)?(?:"content":"")?\}),'
    rb'"logprobs":null,"finish_reason":null'
)
MAX_HELD_BYTES = 2**16
MAX_PARTIAL_BYTES = 2**24  # an event longer than this is passed on in parts; a prompt's ids fill 7 bytes a token


async def relay_whole(
    response: aiohttp.ClientResponse,
    endpoint: Endpoint,
    reply: Reply,
    record: RequestRecord,
    cached: CachedUsage | None = None,
) -> None:
    """An answer that is not streamed. Nothing is sent before all of it is here, so a failure can still be retried."""
    body = await response.read()
    if cached is not None:
        body = await cached.corrected(body)
    if not (body.startswith(b"{") and body.rstrip().endswith(b"}")):
        raise EngineFailure(endpoint, FailureKind.GARBAGE, "its answer is not a JSON object")
    record.mark(Moment.LAST_TOKEN)
    record.num_chunks = 1
    await reply.whole(200, body, [])


class StreamRelay:
    """One stream of server-sent events."""

    def __init__(
        self,
        engine: Engine,
        reply: Reply,
        record: RequestRecord,
        observe_gap: Callable[[float], None],
        transcript: Transcript | None,
        cached: CachedUsage | None = None,
    ) -> None:
        self._engine = engine
        self._cached = cached
        self._endpoint = engine.endpoint
        self._transcript = transcript
        self._reply = reply
        self._record = record
        self._observe_gap = observe_gap
        self._partial = b""
        self._held = b""  # events without anything of the answer: until more comes another engine can still take it
        self._tail = b""
        self._now = asyncio.get_running_loop().time
        self._before = 0.0  # when the last event came; 0 before the first
        self._renew_at = 0.0
        self._plain_until = 0.0  # data that comes before is not the rest of an event, and needs no timer moved

    async def run(self, response: aiohttp.ClientResponse, limit: asyncio.Timeout, gap_limit: float) -> None:
        """Until the engine's end of stream. `limit` is pushed ahead by `gap_limit` seconds as long as events come.

        Raises EngineFailure if the stream ends without [DONE], and the error that an event of the engine's reports.
        """
        if response.content_type != "text/event-stream":
            raise EngineFailure(self._endpoint, FailureKind.GARBAGE, f"it sent {response.content_type}, not a stream")
        self._limit, self._gap_limit = limit, gap_limit
        try:
            await pump(response, self._take)
        except AnswerEnded:
            self._partial = b""
        if not self._has_ended():
            raise EngineFailure(self._endpoint, FailureKind.DISCONNECT, "its stream ended early")
        self._record.mark(Moment.LAST_TOKEN)

    def _take(self, data: bytes, chunk: bytes | None) -> Coroutine[Any, Any, None] | None:
        """The hot path, once for every token of every stream: whole events and nothing special.

        `chunk` is all of the engine's chunk, which the client gets as it is unless something was taken out of it.
        """
        at = self._now()
        if at >= self._plain_until or ERROR in data or not (data.startswith(b"data:") and data.endswith(b"\n\n")):
            return self._take_other(at, data)
        self._observe_gap(at - self._before)
        self._before = at
        if self._cached is not None and self._cached.is_in(data):
            return self._pass_corrected(self._cached, data)
        events = self._noted(data)
        return self._reply.push(events, chunk if events is data else None)

    def _take_other(self, at: float, data: bytes) -> Coroutine[Any, Any, None] | None:
        events = self._whole_events(data)
        self._plain_until = 0.0
        if not events:
            return None
        if at >= self._renew_at:  # moving a timer costs more than all the rest, so it moves in steps
            self._renew(at)
        if b"data:" not in events:  # a comment that keeps the connection alive is no token
            return self._reply.push(events) if self._reply.started else None
        if self._before:
            self._observe_gap(at - self._before)
        self._before = at
        if not self._reply.started:
            events, self._held = self._held + events, b""
            if _is_empty(events):
                self._held = events
                return None
        if ERROR in events or not self._reply.started:
            return self._begin_or_fail(events)
        if not self._partial:
            self._plain_until = self._renew_at
        if self._cached is not None and self._cached.is_in(events):
            return self._pass_corrected(self._cached, events)
        return self._reply.push(self._noted(events))

    async def _pass_corrected(self, cached: CachedUsage, events: bytes) -> None:
        await self._reply.chunk(self._noted(await cached.corrected(events)))

    def _renew(self, at: float) -> None:
        self._limit.reschedule(at + 1.1 * self._gap_limit)
        self._renew_at = at + 0.1 * self._gap_limit
        self._engine.num_progress += 1

    def _has_ended(self) -> bool:
        """Whether what the engine sent is a whole stream."""
        return not self._partial and self._tail.rstrip().endswith(DONE)

    async def _begin_or_fail(self, events: bytes) -> None:
        """Events with an error among them, or the first ones."""
        error = None
        if ERROR in events:
            at = events.index(ERROR)
            events, error = events[:at], self._reported(events[at:])
        if events and not (error is not None and _is_empty(events)):
            if not self._reply.started:
                self._record.mark(Moment.FIRST_TOKEN)
                await self._reply.start_stream()
            if self._cached is not None:
                events = await self._cached.corrected(events)
            await self._reply.chunk(self._noted(events))
        if error is not None:
            raise error

    def _noted(self, events: bytes) -> bytes:
        """Tokens on their way to the client: what it gets of them."""
        if self._transcript is not None:
            events = self._transcript.take(events)
        self._record.num_chunks += 1
        self._tail = events if len(events) > 64 else self._tail[-64:] + events  # a few bytes, or one reference
        return events

    def _whole_events(self, data: bytes) -> bytes:
        """The events that end in `data`; what follows the last of them is kept for the next call."""
        if not self._partial and data.endswith(EVENT_ENDS):
            return data
        data = self._partial + data
        end = max(data.rfind(mark) + len(mark) if mark in data else 0 for mark in EVENT_ENDS)
        if len(data) - end > MAX_PARTIAL_BYTES:
            end = len(data)
        self._partial = data[end:]
        return data[:end]

    def _reported(self, event: bytes) -> EngineFailure | EngineRejected:
        """The error in an event: vLLM sends its 200 before it knows. Before the first token it becomes a status."""
        raw = event.removeprefix(b"data: ").split(b"\n", 1)[0].rstrip()
        try:
            body: Any = orjson.loads(raw)
            code = body["error"].get("code")
            message = str(body["error"].get("message"))
        except (ValueError, TypeError, AttributeError):
            code, message = None, "unreadable"
        if isinstance(code, int) and 400 <= code < 500:
            return EngineRejected(code, raw)
        return EngineFailure(self._endpoint, FailureKind.STATUS, "it reported an error", message[:300])


def _is_empty(events: bytes) -> bool:
    num_empty = len(EMPTY.findall(events)) if len(events) <= MAX_HELD_BYTES else 0
    return num_empty > 0 and num_empty == events.count(b"data:")
