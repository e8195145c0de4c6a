"""Listening to vLLM's own publisher."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from unittest.mock import AsyncMock, MagicMock, patch

import orjson
import pytest
import zmq.asyncio
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch, ZmqEventPublisher

from router.kv_events import EventListener, EventSource
from tests.router.conftest import StartStack
from tests.router.running import wait_for
from tknp.common.ports import free_port

PROMPT = list(range(100, 132))


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
        return True


def block(number: int) -> KVEventBatch:
    """Block `number` of PROMPT was stored."""
    parent = None if number == 0 else b"%d" % (number - 1)
    tokens = PROMPT[number * 4 : number * 4 + 4]
    return KVEventBatch(time.time(), [BlockStored([b"%d" % number], parent, tokens, 4, None, "GPU", None)])


class Publisher:
    """vLLM's, which can be started again on the same ports."""

    def __init__(self, buffer_steps: int = 100) -> None:
        self.port, self.replay_port = free_port(), free_port()
        self._buffer_steps = buffer_steps
        self.start()

    def start(self) -> None:
        self._publisher = ZmqEventPublisher(
            0, f"tcp://*:{self.port}", f"tcp://*:{self.replay_port}", self._buffer_steps, topic="kv"
        )

    def publish(self, *batches: KVEventBatch) -> None:
        for batch in batches:
            self._publisher.publish(batch)

    def stop(self) -> None:
        self._publisher.shutdown()
        wait_for(lambda: is_free(self.port) and is_free(self.replay_port))  # ZMQ closes on a thread of its own

    def told(self, replays: bool = True) -> bytes:
        """What the engine would answer to GET /kv_events."""
        replay = f"tcp://*:{self.replay_port}" if replays else None
        return orjson.dumps(
            {"endpoint": f"tcp://*:{self.port}", "replay_endpoint": replay, "topic": "kv", "block_size": 4}
        )


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    made = Publisher()
    yield made
    made.stop()


@asynccontextmanager
async def listening(publisher: Publisher, replays: bool = True) -> AsyncIterator[EventListener]:
    context = zmq.asyncio.Context()
    listener = EventListener(context, EventSource.parse("http://127.0.0.1:1", publisher.told(replays)))
    task = asyncio.create_task(listener.run())
    try:
        yield listener
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        context.destroy(linger=0)


async def until(condition: Callable[[], bool]) -> None:
    await asyncio.to_thread(wait_for, condition)


def test_what_was_stored_before_anybody_listened_is_replayed(publisher: Publisher) -> None:
    async def run() -> None:
        publisher.publish(block(0), block(1))
        async with listening(publisher) as listener:
            await until(lambda: listener.index.match(PROMPT) == 8)
            publisher.publish(block(2), KVEventBatch(time.time(), [BlockRemoved([b"1"], "GPU")]))
            await until(lambda: listener.index.match(PROMPT) == 4)
            assert len(listener.index) == 2
            publisher.publish(KVEventBatch(time.time(), [AllBlocksCleared()]))
            await until(lambda: len(listener.index) == 0)

    asyncio.run(run())


def test_a_gap_is_filled(publisher: Publisher) -> None:
    async def run() -> None:
        async with listening(publisher) as listener:
            publisher.publish(block(0))
            await until(lambda: listener.index.match(PROMPT) == 4)
            with patch.object(listener, "_hear", AsyncMock()) as lost:  # two batches get lost on their way
                publisher.publish(block(1), block(2))
                await until(lambda: lost.call_count == 2)
            publisher.publish(block(3))
            await until(lambda: listener.index.match(PROMPT) == 16)

    asyncio.run(run())


def test_a_gap_that_can_not_be_filled_empties_the_index() -> None:
    async def run() -> None:
        publisher = Publisher(buffer_steps=1)
        try:
            publisher.publish(block(0), block(1), block(2))
            await asyncio.sleep(0.3)
            async with listening(publisher) as listener:
                await asyncio.wait_for(listener.is_live.wait(), 20)
                assert listener.index.match(PROMPT) == 0
                publisher.publish(KVEventBatch(time.time(), [AllBlocksCleared()]), block(0))
                await until(lambda: listener.index.match(PROMPT) == 4)
        finally:
            publisher.stop()

    asyncio.run(run())


def test_an_engine_that_starts_again_starts_from_nothing(publisher: Publisher) -> None:
    async def run() -> None:
        async with listening(publisher) as listener:
            publisher.publish(block(0), block(1), block(2))
            await until(lambda: listener.index.match(PROMPT) == 12)
            publisher.stop()
            publisher.start()
            await asyncio.sleep(0.5)  # ZMQ connects again by itself
            publisher.publish(block(0))
            await until(lambda: listener.index.match(PROMPT) == 4)

    asyncio.run(run())


def test_without_replay_it_begins_with_what_comes(publisher: Publisher) -> None:
    async def run() -> None:
        publisher.publish(block(0))
        await asyncio.sleep(0.3)
        async with listening(publisher, replays=False) as listener:
            await asyncio.sleep(0.3)
            publisher.publish(block(1), KVEventBatch(time.time(), [AllBlocksCleared()]), block(0))
            await until(lambda: listener.index.match(PROMPT) == 4)

    asyncio.run(run())


def test_a_listener_ends_that_is_cancelled_just_as_something_comes() -> None:
    async def run() -> None:
        comes: asyncio.Future[list[bytes]] = asyncio.get_running_loop().create_future()
        asked = asyncio.Event()
        ask = AsyncMock(side_effect=lambda _: asked.set())
        context, socket = MagicMock(), MagicMock(send_multipart=ask, recv_multipart=lambda: comes)
        context.socket.return_value.__enter__.return_value = socket
        task = asyncio.create_task(EventListener(context, EventSource("tcp://h:1", "tcp://h:2", "", 4)).run())
        await asyncio.wait_for(asked.wait(), 20)
        comes.set_result([b"", (2**64 - 1).to_bytes(8, "big"), b""])
        task.cancel()
        await asyncio.wait([task], timeout=20)
        assert task.cancelled()

    asyncio.run(run())


def test_only_the_engines_own_host_is_connected_to() -> None:
    raw = orjson.dumps({"endpoint": "tcp://evil:5", "replay_endpoint": None, "topic": "", "block_size": 16})
    assert EventSource.parse("http://10.0.0.5:8100", raw).address == "tcp://10.0.0.5:5"
    assert EventSource.parse("http://[fd00::1]:8100", raw).address == "tcp://[fd00::1]:5"
    with pytest.raises(ValueError, match="no fixed TCP port"):
        EventSource.parse("http://h:1", raw.replace(b"tcp://evil:5", b"ipc:///tmp/x"))


def test_a_request_goes_where_its_prompt_is_cached_by_the_engines_own_word(
    start_stack: StartStack, publisher: Publisher
) -> None:
    stack = start_stack(2, 1, prefill_policy="prefix_aware", health_check_interval=0.1, events=[None, publisher.told()])
    (_, second, _) = stack.router.state.pool.engines
    publisher.publish(*(block(number) for number in range(8)))
    wait_for(lambda: second.load.events is not None and second.load.events.match(PROMPT) == 32)
    for _ in range(3):
        assert stack.router.complete(prompt=PROMPT).status == 200
    assert [len(engine.seen) for engine in stack.prefill] == [0, 3]
    # A text is tokenized by an engine; 300 characters, because a shorter one is not worth the question.
    text = "x" * 300
    for engine in stack.prefill + stack.decode:
        engine.tokens = [*PROMPT, *range(50)]
    assert stack.router.complete(prompt=text).status == 200
    assert [len(engine.seen) for engine in stack.prefill] == [0, 4]
    publisher.publish(KVEventBatch(time.time(), [AllBlocksCleared()]))
    wait_for(lambda: second.load.events is not None and second.load.events.match(PROMPT) == 0)
    assert stack.router.complete(prompt=PROMPT).status == 200
    assert [len(engine.seen) for engine in stack.prefill] == [1, 4], "now both lack it, and the first had fewer"
    stack.prefill[1].kill()
    wait_for(lambda: second.load.events is None)
