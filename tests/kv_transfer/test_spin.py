"""vLLM's message queue between an engine and its workers, the real one, read in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue, SpinCondition

from kv_transfer import spin
from tests.services.contract import VLLM, require

NUM_PAIRS = 20
PAUSE = 0.5  # s between two messages, in which vLLM's reader spins


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for patched in ("record_read", "wait"):
        monkeypatch.setattr(SpinCondition, patched, getattr(SpinCondition, patched))  # put back afterwards
    spin.install()
    yield
    spin.rest(False)


def seconds_of_cpu(num_messages: int) -> float:
    """Of a reader of messages that come PAUSE seconds apart, from the second on."""
    writer = MessageQueue(1, 1)
    seen: list[Any] = []
    spent: list[float] = []

    def read() -> None:
        reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
        reader.wait_until_ready()
        for _ in range(num_messages):
            seen.append(reader.dequeue())
            spent.append(time.thread_time())

    thread = threading.Thread(target=read)
    thread.start()
    writer.wait_until_ready()
    for number in range(num_messages):
        writer.enqueue(number)
        time.sleep(PAUSE)
    thread.join(30)
    assert seen == list(range(num_messages))
    return spent[-1] - spent[0]


def test_a_worker_sleeps_between_the_steps_of_an_engine_that_rests() -> None:
    spin.rest(True)
    assert seconds_of_cpu(4) < 0.2 * 3 * PAUSE


def test_a_message_right_behind_another_is_read_soon() -> None:
    """A released lease and the step that frees its blocks: the second one's notification is dropped."""
    spin.rest(True)
    writer = MessageQueue(1, 1)
    seen: list[int] = []

    def read() -> None:
        reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
        reader.wait_until_ready()
        while len(seen) < 2 * NUM_PAIRS:
            seen.append(reader.dequeue())

    thread = threading.Thread(target=read)
    thread.start()
    writer.wait_until_ready()
    slowest = 0.0
    for number in range(2 * NUM_PAIRS):
        if number % 2 == 0:
            time.sleep(5 * spin.SPIN_SECONDS)  # until the reader sleeps
        begin = time.monotonic()
        writer.enqueue(number)
        while len(seen) == number:
            time.sleep(0)
        slowest = max(slowest, time.monotonic() - begin)
    thread.join(30)
    assert slowest < 2.0, "vLLM looks again after 5 s"


def test_it_spins_otherwise() -> None:
    spin.rest(False)
    assert seconds_of_cpu(2) > 0.2 * PAUSE


def test_vllms_worker_spins_by_this() -> None:
    text = " ".join((VLLM / "distributed/device_communicators/shm_broadcast.py").read_text().split())
    for part in (
        "def record_read(self): self.last_read = time.monotonic() def",
        "if current_time <= self.last_read + self.busy_loop_s: sched_yield()",
        "self._spin_condition.record_read()",
        "def wait(self, timeout_ms: int | None = None) -> None:",
        "self._spin_condition.wait(timeout_ms=read_timeout.timeout_ms()) if self.shutting_down",
    ):
        require(part in text, f"SpinCondition's {part!r}", "kv_transfer/spin.py")
