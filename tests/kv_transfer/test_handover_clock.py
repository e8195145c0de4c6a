from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from kv_transfer.copies import Copies
from kv_transfer.handover import HandOver, HandOverClock, Stage
from kv_transfer.metadata import TransferRecord


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time; its item is to be set."""
    now = [100.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


def record(begin: float, end: float, copy: float, rank: int = 1) -> TransferRecord:
    return TransferRecord(rank, 10, 1, begin, end, copy, "nixl")


def test_a_hand_over_ends_with_the_first_step_after_the_pull(now: list[float]) -> None:
    clock = HandOverClock()
    clock.order("r", arrived=98.0)
    now[0] = 103.0
    assert clock.start({"r"}) == [], "nothing has arrived"
    clock.complete("r", record(5000.0, 5002.0, copy=1.5))  # the rank's host has another clock
    assert clock.start({"other"}) == []
    now[0] = 104.0
    assert clock.start({"r", "other"}) == [HandOver(1, "nixl", {Stage.ROOM: 2.0, Stage.PULL: 0.5, Stage.RESUME: 2.0})]
    assert clock.start({"r"}) == [] and not len(clock)


def test_the_prefill_of_a_streamed_request_is_no_part_of_its_hand_over(now: list[float]) -> None:
    clock = HandOverClock()
    clock.order("r", arrived=98.0)
    clock.complete("r", replace(record(5000.0, 5002.0, copy=0.5), prefill_seconds=60.0))
    now[0] = 163.0
    (one,) = clock.start({"r"})
    assert one.seconds == {Stage.ROOM: 2.0, Stage.PULL: 1.5, Stage.RESUME: 1.0}


def test_a_rank_s_tensor_parallel_workers_count_as_one(now: list[float]) -> None:
    clock = HandOverClock()
    clock.order("r", arrived=100.0)
    clock.complete("r", record(100.0, 101.0, copy=0.25))
    clock.complete("r", record(100.5, 103.0, copy=2.0))
    now[0] = 104.0
    (one,) = clock.start({"r"})
    assert one.seconds == {Stage.ROOM: 0.0, Stage.PULL: 1.0, Stage.RESUME: 1.0}


def test_a_clock_that_is_set_back_makes_no_negative_time(now: list[float]) -> None:
    clock = HandOverClock()
    clock.order("r", arrived=200.0)
    clock.complete("r", record(100.0, 99.0, copy=0.25))
    assert all(s >= 0 for s in clock.start({"r"})[0].seconds.values())


def test_what_came_to_nothing_is_forgotten(now: list[float]) -> None:
    clock = HandOverClock()
    clock.order("r", arrived=100.0)
    clock.forget("r")
    clock.complete("r", record(100.0, 101.0, copy=0.0))
    assert clock.start({"r"}) == [] and not len(clock)


def test_the_path_of_several_copies_is_nixl_if_one_went_there() -> None:
    stats: dict[str, list[Any]] = {
        "bytes_transferred": [1, 10, 100, 1000],
        "transfer_duration": [9.0, 0.5, 0.25, 0.75],
        "transfer_path": ["nixl", "direct", "direct", "nixl"],
    }
    first_three = {name: values[:3] for name, values in stats.items()}
    some = Copies().and_those(first_three, 1)
    assert some == Copies(110, 2, 0.5, "direct")
    assert some.and_those(stats, 4) == some
    assert some.and_those(stats, 3) == Copies(1110, 3, 0.75, "nixl")
