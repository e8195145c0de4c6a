from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
import zmq

from kv_transfer.side_channel import Message, Peer, SideChannel, SideChannelClient
from tknp.common.ports import free_port


class Echo:
    """A listener that sends what it is told back, and notes whom it has lost."""

    def __init__(self) -> None:
        self.gone: queue.Queue[Peer] = queue.Queue()
        self.peers: queue.Queue[Peer] = queue.Queue()
        self.channel = SideChannel("127.0.0.1")
        self.channel.handle("echo", self._echo)
        self.channel.handle("fail", self._fail)
        self.channel.on_gone(self.gone.put)

    def _echo(self, peer: Peer, body: object) -> None:
        self.channel.send(peer, "echoed", body)
        self.peers.put(peer)

    def _fail(self, peer: Peer, body: object) -> None:
        raise RuntimeError("a handler that fails")


@pytest.fixture
def echo() -> Iterator[Echo]:
    made = Echo()
    yield made
    made.channel.close()


@pytest.fixture
def connect() -> Iterator[Callable[[str], SideChannelClient]]:
    made: list[SideChannelClient] = []

    def make(address: str) -> SideChannelClient:
        made.append(SideChannelClient(address))
        return made[-1]

    yield make
    for client in made:
        client.close()


def heard(client: SideChannelClient, count: int = 1) -> list[Message]:
    messages: list[Message] = []
    deadline = time.monotonic() + 20
    while len(messages) < count and time.monotonic() < deadline:
        messages += client.receive(100)
    return messages


def is_gone(client: SideChannelClient) -> bool:
    deadline = time.monotonic() + 20
    while not client.is_gone and time.monotonic() < deadline:
        client.receive(20)
    return client.is_gone


def test_messages_keep_their_order_and_reach_whom_they_are_for(
    echo: Echo, connect: Callable[[str], SideChannelClient]
) -> None:
    one, other = connect(echo.channel.address), connect(echo.channel.address)
    for i in range(100):
        one.send("echo", [i, "one", {"blocks": [1, 2]}])
        other.send("echo", [i, "other", None])
    assert heard(one, 100) == [("echoed", [i, "one", {"blocks": [1, 2]}]) for i in range(100)]
    assert heard(other, 100) == [("echoed", [i, "other", None]) for i in range(100)]
    assert not one.is_gone


def test_what_is_no_message_or_fails_ends_nothing(echo: Echo, connect: Callable[[str], SideChannelClient]) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 1000)
        socket.connect(echo.channel.address)
        for nonsense in (b"\xc1", b"", msgspec.msgpack.encode(("unknown", 1)), msgspec.msgpack.encode([["echo"], 1])):
            socket.send(nonsense)
        socket.send_multipart([b"two", b"frames"])
        socket.send(msgspec.msgpack.encode(("fail", 1)))
        socket.send(msgspec.msgpack.encode(("echo", 1)))
        assert socket.poll(20_000)
    client = connect(echo.channel.address)
    client.send("echo", 2)
    assert heard(client) == [("echoed", 2)]


def test_a_client_hears_what_was_sent_before_the_end_and_then_of_it(
    echo: Echo, connect: Callable[[str], SideChannelClient]
) -> None:
    client = connect(echo.channel.address)
    client.send("echo", 1)
    assert echo.peers.get(timeout=20)
    echo.channel.close()
    assert heard(client) == [("echoed", 1)]
    assert is_gone(client)


def test_nobody_listening_is_noticed(connect: Callable[[str], SideChannelClient]) -> None:
    assert is_gone(connect(f"tcp://127.0.0.1:{free_port()}"))


def test_a_client_that_went_away_is_forgotten(echo: Echo, connect: Callable[[str], SideChannelClient]) -> None:
    client = connect(echo.channel.address)
    client.send("echo", 1)
    assert heard(client)
    peer = echo.peers.get(timeout=20)
    client.close()
    deadline = time.monotonic() + 20
    while echo.gone.empty() and time.monotonic() < deadline:
        echo.channel.send(peer, "anything", None)
        time.sleep(0.01)
    assert echo.gone.get_nowait() == peer
