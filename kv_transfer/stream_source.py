"""A prefill engine tells, while it computes a prompt, how much of its KV cache there is already, and where.

A *stream* is named by the lease under which the KV cache will be kept (`tknp_lease_id`). Who subscribes to it, on the
side channel of the engine's scheduler, gets:

    progress  [stream, generation, num_tokens, block_ids]: the KV cache of the first `num_tokens` tokens is complete, in
              these blocks; `generation` counts how often the request was preempted, which makes void what was said
    end       [stream, params]: the prompt is computed; `kv_transfer_params` as the engine answers with them
    over      [stream]: there is no such KV cache, or there is none any more

The scheduler says so, and not the workers, since it hears of a step only when all workers, and their GPUs, have
finished it. A block that was told of may be another request's by the time that it is read: what is read counts for
nothing until the end, whose lease is checked as always (kv_transfer.identity)."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from kv_transfer.side_channel import Peer, SideChannel

SUBSCRIBE, UNSUBSCRIBE = "subscribe", "unsubscribe"
PROGRESS, END, OVER = "progress", "end", "over"

_MAX_UNKNOWN = 10_000
"""Names kept of streams that are over, and of such that are asked for and not known yet."""


@dataclass
class _Stream:
    """Attributes:
    request_id: None if it was asked for before its request has come.
    news: the last message of each kind, for those who subscribe late.
    """

    request_id: str | None = None
    generation: int = 0
    readers: set[Peer] = field(default_factory=set)
    news: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Chunk:
    """What a step computes of a streamed request; see the module.

    Attributes:
        num_tokens_before, num_tokens: that are computed before the step, and after it.
    """

    generation: int
    num_tokens_before: int
    num_tokens: int
    block_ids: list[int]


@dataclass(frozen=True)
class _Scheduled:
    step: int
    request_id: str
    chunk: Chunk


class StreamSource:
    """The streams of an engine; its scheduler's, but for the handlers of the side channel."""

    def __init__(self, host: str, tells_progress: bool) -> None:
        """Args:
        host: see SideChannel.
        tells_progress: a step's KV cache stands in its blocks when the step is done, and all layers have the same
            blocks, for all tokens. Otherwise only ends are told.
        """
        self._tells_progress = tells_progress
        self._lock = threading.Lock()  # over all below
        self._streams: OrderedDict[str, _Stream] = OrderedDict()
        self._names: dict[str, str] = {}  # of requests
        self._over: OrderedDict[str, None] = OrderedDict()
        self._scheduled: deque[_Scheduled] = deque()
        self._channel = SideChannel(host)
        self._channel.handle(SUBSCRIBE, self._subscribe)
        self._channel.handle(UNSUBSCRIBE, self._unsubscribe)
        self._channel.on_gone(self._drop_reader)
        self.address: str = self._channel.address

    def close(self) -> None:
        self._channel.close()

    # -- of the scheduler --

    def open(self, request_id: str, name: str) -> None:
        """A request has come whose KV cache is streamed, unless another one is, or was, under this name."""
        with self._lock:
            if name not in self._over and self._streams.setdefault(name, _Stream()).request_id is None:
                self._streams[name].request_id = request_id
                self._names[request_id] = name

    def schedule(self, step: int, output: Any) -> dict[str, Chunk]:
        """Notes what a step, of vLLM's SchedulerOutput, will compute of the streamed requests; returns it by stream."""
        chunks: dict[str, Chunk] = {}
        if not self._names or not self._tells_progress:
            return chunks
        with self._lock:
            new, cached = output.scheduled_new_reqs, output.scheduled_cached_reqs
            # One that was preempted between two steps is only seen to come back.
            for request_id in (output.preempted_req_ids or set()) | cached.resumed_req_ids:
                if stream := self._stream_of(request_id):
                    stream.generation += 1
                    self._tell(stream, PROGRESS, [stream.generation, 0, []])
            computed = {data.req_id: data.num_computed_tokens for data in new}
            computed |= zip(cached.req_ids, cached.num_computed_tokens, strict=True)
            for request_id, num_computed in computed.items():
                stream = self._stream_of(request_id)
                block_ids = output.kv_connector_block_state.get_block_ids(request_id)
                if stream and END not in stream.news and block_ids is not None:
                    num_tokens = num_computed + output.num_scheduled_tokens[request_id]
                    chunk = Chunk(stream.generation, num_computed, num_tokens, list(block_ids[0]))
                    self._scheduled.append(_Scheduled(step, request_id, chunk))
                    chunks[self._names[request_id]] = chunk
        return chunks

    def computed(self, step: int) -> None:
        """All workers have finished this step, and so those before."""
        with self._lock:
            while self._scheduled and self._scheduled[0].step <= step:
                done = self._scheduled.popleft()
                stream, chunk = self._stream_of(done.request_id), done.chunk
                if stream and stream.generation == chunk.generation and END not in stream.news:
                    self._tell(stream, PROGRESS, [chunk.generation, chunk.num_tokens, chunk.block_ids])

    def finish(self, request_id: str, params: dict[str, Any] | None) -> None:
        """A request has ended; `params`: where its KV cache is kept, None if it is not."""
        with self._lock:
            if params is None:
                self._end(request_id)
            elif stream := self._stream_of(request_id):
                self._tell(stream, END, [params])

    def forget(self, request_ids: Iterable[str]) -> None:
        """These requests' KV cache is not kept any more."""
        with self._lock:
            for request_id in request_ids:
                self._end(request_id)

    @property
    def has_streams(self) -> bool:
        return bool(self._names)

    def _stream_of(self, request_id: str) -> _Stream | None:
        name = self._names.get(request_id)
        return None if name is None else self._streams.get(name)

    def _tell(self, stream: _Stream, kind: str, news: list[Any]) -> None:
        assert stream.request_id is not None
        body = [self._names[stream.request_id], *news]
        stream.news[kind] = body
        for reader in stream.readers:
            self._channel.send(reader, kind, body)

    def _end(self, request_id: str) -> None:
        name = self._names.pop(request_id, None)
        if name is None:
            return
        stream = self._streams.pop(name)
        for reader in stream.readers:
            self._channel.send(reader, OVER, [name])
        self._over[name] = None
        if len(self._over) > _MAX_UNKNOWN:
            self._over.popitem(last=False)

    # -- of the side channel --

    def _subscribe(self, peer: Peer, name: Any) -> None:
        with self._lock:
            if not isinstance(name, str) or name in self._over:
                self._channel.send(peer, OVER, [name])
                return
            stream = self._streams.setdefault(name, _Stream())
            stream.readers.add(peer)
            for kind, body in stream.news.items():
                self._channel.send(peer, kind, body)
            if len(self._streams) > len(self._names) + _MAX_UNKNOWN:
                unknown = next(n for n, s in self._streams.items() if s.request_id is None)
                del self._streams[unknown]

    def _unsubscribe(self, peer: Peer, name: Any) -> None:
        with self._lock:
            if stream := self._streams.get(name):
                stream.readers.discard(peer)
                if stream.request_id is None and not stream.readers:
                    del self._streams[name]

    def _drop_reader(self, peer: Peer) -> None:
        with self._lock:
            for stream in self._streams.values():
                stream.readers.discard(peer)
