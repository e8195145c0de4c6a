"""First contact with prefill engines: real ones (tests/kv_transfer/pair.py), and ports where nobody or somebody slow
listens."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest
import zmq

from kv_transfer.handshakes import HandshakeExecutor


class Contacts:
    """An executor, the handshakes that it ran, and how often it asked again."""

    def __init__(self, give_up_after: float = 30.0) -> None:
        self.num_retries = 0
        self.warmed: list[tuple[str, int, tuple[int, int], str]] = []
        self.under_way = 0
        self.executor = HandshakeExecutor(give_up_after, self._on_retry, lambda *args: self.warmed.append(args))

    def _on_retry(self) -> None:
        self.num_retries += 1

    def submit(self, port: int, engine_id: str) -> Future[Any]:
        return self.executor.submit(self._handshake, "127.0.0.1", port, 1, engine_id)

    def _handshake(self, host: str, port: int, tp_size: int, engine_id: str) -> Any:
        self.under_way += 1
        assert self.under_way == 1, "two handshakes at a time"
        time.sleep(0.02)
        self.under_way -= 1
        return {(0, 0): f"agent of {engine_id}"}, 0.0


@contextmanager
def side_channel(delay: float = 0.0) -> Iterator[int]:
    """Answers every question so much later; its port."""
    context: Any = zmq.Context.instance()
    with context.socket(zmq.ROUTER) as sock:
        port = sock.bind_to_random_port("tcp://127.0.0.1")
        stop = threading.Event()

        def serve() -> None:
            begin = time.monotonic()
            while not stop.is_set():
                if sock.poll(20) and time.monotonic() - begin > delay:
                    sock.send_multipart([*sock.recv_multipart()[:2], b"metadata"])

        thread = threading.Thread(target=serve)
        thread.start()
        yield port
        stop.set()
        thread.join()


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Accepts connections and says nothing, like an engine that was stopped."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_one_that_does_not_answer_delays_nobody(silent_port: int) -> None:
    contacts = Contacts()
    stuck = contacts.submit(silent_port, "stuck")
    with side_channel() as port:
        others = [contacts.submit(port, f"e{i}") for i in range(5)]
        assert [other.result(10)[0] for other in others] == [{(0, 0): f"agent of e{i}"} for i in range(5)]
    assert not stuck.done()
    assert sorted(contacts.warmed) == [("127.0.0.1", port, (0, 0), f"agent of e{i}") for i in range(5)]
    contacts.executor.shutdown()
    with pytest.raises(TimeoutError):
        stuck.result(10)


def test_one_that_is_slow_is_asked_again() -> None:
    contacts = Contacts()
    with side_channel(delay=1.0) as port:
        assert contacts.submit(port, "slow").result(20)
    assert contacts.num_retries >= 1
    contacts.executor.shutdown()


def test_one_that_never_answers_is_given_up_with_its_address(silent_port: int) -> None:
    contacts = Contacts(give_up_after=0.5)
    with pytest.raises(TimeoutError, match=f"prefill engine gone did not answer at 127.0.0.1:{silent_port}"):
        contacts.submit(silent_port, "gone").result(10)
    contacts.executor.shutdown()
