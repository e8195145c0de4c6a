"""Listens to the KV cache events of engines that publish them, and keeps each one's EventIndex true.

vLLM publishes over ZMQ if it was started with --kv-events-config (vllm/distributed/kv_events.py): numbered batches on
one port, and on another, if it is set, the last ones again for who missed some. Our engines say at `GET /kv_events`
which ports these are. An engine that does not, such as a stock vLLM server, is judged by what was sent to it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import aiohttp
import msgspec
import orjson
import zmq
import zmq.asyncio

from router.event_index import EventIndex

if TYPE_CHECKING:
    from router.engines import Engine, EnginePool
    from router.types import Role

logger = logging.getLogger(__name__)

CHECK_INTERVAL = 1.0  # s; how soon an engine that came up or went down is noticed
ASK_INTERVAL = 60.0  # s between two questions to an engine that publishes nothing, or whose events made no sense
ASK_TIMEOUT = 5.0  # s
REPLAY_TIMEOUT = 5.0  # s without a further batch; the engine answers between two steps
FIRST_QUIET, LAST_QUIET = 0.5, 30.0  # s without a batch before it asks whether it missed any; doubled each time
MAX_WAITING = 100_000  # batches that ZMQ keeps for us, as many as for the engine; more are dropped and replayed


@dataclass(frozen=True, slots=True)
class EventSource:
    """Where an engine publishes. The host is always the engine's own, whatever it says of itself."""

    address: str  # tcp://host:port
    replay_address: str | None
    topic: str
    block_size: int  # tokens

    @classmethod
    def parse(cls, url: str, raw: bytes) -> EventSource:
        """The answer of `GET /kv_events` of the engine at `url`. Raises ValueError, TypeError or KeyError."""
        told = orjson.loads(raw)
        host = urlsplit(url).hostname

        def address(endpoint: str) -> str:
            port = urlsplit(endpoint).port
            if not port:
                raise ValueError(f"{endpoint!r} has no fixed TCP port")
            return f"tcp://[{host}]:{port}" if host and ":" in host else f"tcp://{host}:{port}"

        replay = told.get("replay_endpoint")
        return cls(
            address(told["endpoint"]), address(replay) if replay else None, str(told["topic"]), int(told["block_size"])
        )


class EventListener:
    """One engine's stream of events, in order and without gaps, into an index."""

    def __init__(self, context: zmq.asyncio.Context, source: EventSource) -> None:
        self._context = context
        self._source = source
        self.index = EventIndex(source.block_size)
        self.is_live = asyncio.Event()  # the engine was heard: what the index does not have, the engine has not
        self._heard = -1  # the last number that the engine published
        self._applied = -1  # the last number that is in the index, replayed ones included
        self._applied_at = 0.0  # when that was published: unix seconds by the engine's clock

    async def run(self) -> None:
        """Never ends. Raises ValueError, TypeError or KeyError for what is not a batch of vLLM's."""
        with self._context.socket(zmq.SUB) as socket:
            socket.set_hwm(MAX_WAITING)
            socket.connect(self._source.address)
            socket.subscribe(self._source.topic)
            await self._replay()  # what it stored before anybody listened
            quiet = FIRST_QUIET
            while True:
                if await socket.poll(int(quiet * 1000)):
                    _, number, payload = await socket.recv_multipart()
                    await self._hear(int.from_bytes(number, "big"), payload)
                else:  # it has nothing to say, or said it before the connection stood
                    await self._replay()
                    quiet = min(2 * quiet, LAST_QUIET)

    async def _hear(self, number: int, payload: bytes) -> None:
        # A number comes again if it was replayed before it was heard, or if the engine was started again.
        if number <= self._heard or (number <= self._applied and _published_at(payload) > self._applied_at):
            self.index.clear()
            self._applied = -1
        self._heard = number
        if number > self._applied + 1:
            await self._replay()
        if number > self._applied + 1:  # what is missing is lost: half of the truth would be none
            self.index.clear()
        if number > self._applied:
            self._apply(number, payload)

    def _apply(self, number: int, payload: bytes) -> None:
        at, events, *_ = msgspec.msgpack.decode(payload)
        for event in events:
            self.index.apply(event)
        self._applied, self._applied_at = number, at
        self.is_live.set()

    async def _replay(self) -> None:
        """Asks for everything after what is in the index. Without an answer nothing changes."""
        if self._source.replay_address is None:
            return
        with self._context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.connect(self._source.replay_address)
            try:
                await socket.send_multipart([b"", (self._applied + 1).to_bytes(8, "big")])
                while True:
                    async with asyncio.timeout(REPLAY_TIMEOUT):  # Python 3.11's wait_for may swallow a cancellation
                        frames = await socket.recv_multipart()
                    number, payload = int.from_bytes(frames[-2], "big", signed=True), frames[-1]
                    if number < 0:  # the end
                        self.is_live.set()
                        return
                    if number > self._applied + 1:  # the engine no longer has what came before
                        self.index.clear()
                    self._apply(number, payload)
            except TimeoutError:
                logger.warning("%s did not replay its KV events in %g s", self._source.replay_address, REPLAY_TIMEOUT)


def _published_at(payload: bytes) -> float:
    at, *_ = msgspec.msgpack.decode(payload)
    return float(at)


class KvEventWatcher:
    """Finds out which engines publish, and listens to each for as long as it is up."""

    def __init__(self, pool: EnginePool, session: aiohttp.ClientSession, roles: Collection[Role]) -> None:
        self._pool = pool
        self._session = session
        self._roles = roles

    async def run(self) -> None:
        """Never ends, unless no policy wants to know."""
        if not self._roles:
            return
        context = zmq.asyncio.Context()
        try:
            await self._pool.for_each(lambda engine: self._watch(engine, context))
        finally:
            context.destroy(linger=0)

    async def _watch(self, engine: Engine, context: zmq.asyncio.Context) -> None:
        while engine.endpoint.role in self._roles:
            pause = CHECK_INTERVAL
            if engine.is_up:
                try:
                    source = await self._ask(engine)
                    if source is None:
                        pause = ASK_INTERVAL
                    else:
                        await self._listen(engine, EventListener(context, source))
                except (aiohttp.ClientError, OSError) as error:
                    logger.warning("%s could not be asked for its KV events: %r", engine.endpoint.name, error)
                except (ValueError, TypeError, KeyError) as error:
                    logger.warning("the KV events of %s can't be understood: %r", engine.endpoint.name, error)
                    pause = ASK_INTERVAL
            await asyncio.sleep(pause)

    async def _ask(self, engine: Engine) -> EventSource | None:
        async with asyncio.timeout(ASK_TIMEOUT):
            async with self._session.get(f"{engine.endpoint.url}/kv_events") as response:
                raw = await response.read()
        return EventSource.parse(engine.endpoint.url, raw) if response.status == 200 else None

    async def _listen(self, engine: Engine, listener: EventListener) -> None:
        """Until the engine goes down."""
        task = asyncio.create_task(listener.run())
        try:
            while engine.is_up and not task.done():
                if listener.is_live.is_set() and engine.load.events is None:
                    engine.load.events = listener.index
                    logger.info("%s tells what it has cached by its KV events", engine.endpoint.name)
                await asyncio.wait([task], timeout=CHECK_INTERVAL)
            if task.done():
                task.result()
        finally:
            engine.load.events = None
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
