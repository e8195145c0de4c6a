from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Coroutine
from functools import wraps
from typing import Any, Protocol

import pytest

from router.callers import Caller, Priority
from router.fair_queue import Account, FairQueue, Verdict, Waiter


class AsyncTest(Protocol):
    def __call__(self, *args: Any, **kwargs: Any) -> Coroutine[Any, Any, None]: ...


def in_loop(test: AsyncTest) -> Any:
    """Waiters belong to an event loop."""

    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


def account(name: str, weight: float = 1.0) -> Account:
    return Account(Caller(name.encode(), name, weight=weight))


def push(queue: FairQueue, who: Account, priority: Priority = Priority.NORMAL) -> Waiter:
    waiter = queue.push(who, priority)
    assert waiter is not None
    return waiter


def serve(queue: FairQueue, count: int) -> str:
    """The names of those whose turn came, each served before the next is chosen."""
    served = [queue.pop() for _ in range(count)]
    return "".join(waiter.lane.account.caller.name or "" for waiter in served if waiter is not None)


@in_loop
async def test_one_callers_requests_come_in_order() -> None:
    queue, a = FairQueue(10), account("a")
    waiters = [push(queue, a) for _ in range(5)]
    assert [queue.pop() for _ in range(5)] == waiters
    assert queue.pop() is None
    assert len(queue) == 0


@in_loop
async def test_a_flood_does_not_keep_others_waiting() -> None:
    queue, a, b = FairQueue(100), account("a"), account("b")
    for _ in range(50):
        push(queue, a)
    push(queue, b)
    push(queue, b)
    assert serve(queue, 5) in ("abaab", "ababa", "baba" + "a")


@pytest.mark.parametrize("weight", [2.0, 3.0, 0.5])
@in_loop
async def test_weights_are_shares_even_with_one_slot(weight: float) -> None:
    queue, a, b = FairQueue(1000), account("a", weight), account("b")
    for _ in range(400):
        push(queue, a)
        push(queue, b)
    served = Counter(serve(queue, 300))
    assert served["a"] / served["b"] == pytest.approx(weight, rel=0.05)


@pytest.mark.parametrize("weight", [1.0, 3.0])
@in_loop
async def test_slots_in_flight_are_shared_whatever_answers_last(weight: float) -> None:
    """Answers of `a` take ten times as long; in the end both hold the slots that their weights say."""
    queue, a, b = FairQueue(5000), account("a", weight), account("b")
    running: list[tuple[int, Account]] = []
    held: Counter[str | None] = Counter()
    for now in range(3000):
        for who in (a, b):
            while sum(len(lane.waiting) for lane in queue._lanes.values() if lane.account is who) < 20:
                push(queue, who)
        for ended in [entry for entry in running if entry[0] <= now]:
            running.remove(ended)
            ended[1].num_in_flight -= 1
        while len(running) < 16:
            waiter = queue.pop()
            assert waiter is not None
            who = waiter.lane.account
            who.num_in_flight += 1
            running.append((now + (50 if who is a else 5), who))
        if now > 500:
            held.update(who.caller.name for _, who in running)
    assert held["a"] / held["b"] == pytest.approx(weight, rel=0.1)


@in_loop
async def test_who_was_away_has_not_saved_up_turns() -> None:
    queue, a, b = FairQueue(1000), account("a"), account("b")
    for _ in range(200):
        push(queue, a)
    serve(queue, 100)
    for _ in range(100):
        push(queue, b)
    assert Counter(serve(queue, 20)) == {"a": 10, "b": 10}


@in_loop
async def test_priorities_are_strict() -> None:
    queue, a, b, c = FairQueue(10), account("a"), account("b"), account("c")
    push(queue, a, Priority.LOW)
    push(queue, b, Priority.NORMAL)
    push(queue, c, Priority.HIGH)
    push(queue, c, Priority.HIGH)
    assert queue.lengths() == {Priority.HIGH: 2, Priority.NORMAL: 1, Priority.LOW: 1}
    assert serve(queue, 4) == "ccba"


@in_loop
async def test_a_full_queue_turns_away() -> None:
    queue, a = FairQueue(2), account("a")
    push(queue, a)
    push(queue, a)
    assert queue.push(a, Priority.NORMAL) is None
    assert queue.push(account("b"), Priority.LOW) is None
    assert len(queue) == 2
    assert FairQueue(0).push(a, Priority.HIGH) is None


@in_loop
async def test_a_full_queue_has_room_for_higher_priorities_and_for_those_with_less() -> None:
    queue, a, b = FairQueue(3), account("a"), account("b")
    old, middle, new = (push(queue, a) for _ in range(3))
    push(queue, b)
    assert new.verdict.result() is Verdict.DISPLACED  # the newest of whoever has most
    assert not old.verdict.done()
    assert queue.push(b, Priority.NORMAL) is None  # b would then have as many as a
    push(queue, a, Priority.HIGH)
    assert middle.verdict.result() is Verdict.DISPLACED
    assert len(queue) == 3
    assert serve(queue, 3)[0] == "a"


@in_loop
async def test_who_left_is_passed_over() -> None:
    queue, a = FairQueue(10), account("a")
    first, second, third = (push(queue, a) for _ in range(3))
    first.verdict.cancel()
    queue.remove(second)
    queue.remove(second)
    assert queue.pop() is third
    assert queue.pop() is None
    assert len(queue) == 0


@in_loop
async def test_the_length_is_right_whatever_happens() -> None:
    rng = random.Random(5)
    queue = FairQueue(20)
    accounts = [account(name, rng.choice([0.5, 1, 4])) for name in "abcdef"]
    alive: set[Waiter] = set()
    for _ in range(5000):
        kind = rng.random()
        if kind < 0.6:
            waiter = queue.push(rng.choice(accounts), rng.choice(list(Priority)))
            alive |= {waiter} if waiter else set()
        elif kind < 0.8 and (popped := queue.pop()) is not None:
            alive.remove(popped)
        elif alive:
            gone = rng.choice(sorted(alive, key=id))
            alive.remove(gone)
            queue.remove(gone)
        alive = {waiter for waiter in alive if not waiter.verdict.done()}
        assert len(queue) == len(alive) == sum(queue.lengths().values()) <= 20
