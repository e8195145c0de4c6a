"""Whose turn it is: strict priorities, and fair shares among the callers of one priority.

A slot that becomes free goes to the highest priority that waits, and there to the caller with the fewest requests in
flight for its weight. Slots are held for as long as an answer takes, so equal slots are equal use of the engines,
however long anybody's answers are. Among callers with equally many, virtual time decides, as in start-time fair
queueing (Goyal, Vin and Cheng, 1996): each turn moves a caller's own clock ahead by 1 / weight, and the clock that is
furthest behind goes first. Without that, weights would mean nothing where there are fewer slots than callers.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from enum import Enum, auto
from typing import TYPE_CHECKING

from router.callers import Priority

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from router.callers import Caller


class Verdict(Enum):
    ADMITTED = auto()
    DISPLACED = auto()


class Account:
    """One caller's requests in the router. `caller` is as of its last request: a key file may have been changed."""

    def __init__(self, caller: Caller) -> None:
        self.caller = caller
        self.num_open = 0  # waiting or in flight
        self.num_in_flight = 0


class Lane:
    """One caller's requests that wait in one priority, oldest first."""

    def __init__(self, account: Account) -> None:
        self.account = account
        self.clock = 0.0  # virtual time at which its next turn is due
        self.waiting: OrderedDict[Waiter, None] = OrderedDict()

    @property
    def length(self) -> float:
        """Requests that wait, for the caller's weight."""
        return len(self.waiting) / self.account.caller.weight

    @property
    def rank(self) -> tuple[float, float]:
        """The lane with the smallest goes first."""
        return self.account.num_in_flight / self.account.caller.weight, self.clock


class Waiter:
    """One request that waits; `verdict` says how the wait ended, and is cancelled with the task that awaits it."""

    __slots__ = ("fits", "lane", "priority", "verdict")

    def __init__(self, lane: Lane, priority: Priority) -> None:
        self.lane = lane
        self.priority = priority
        self.verdict: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self.fits: Callable[[], bool] = lambda: True  # whether the engines have room for it now


class FairQueue:
    """Bounded. Push and remove take constant time; pop and displacement look once at each caller that waits."""

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length
        self._length = 0
        self._now = 0.0  # virtual time: the furthest clock that was served
        self._lanes: dict[tuple[Priority, bytes], Lane] = {}  # kept while empty, for their clocks
        self._active: dict[Priority, dict[bytes, Lane]] = {priority: {} for priority in Priority}

    def __len__(self) -> int:
        return self._length

    def lengths(self) -> dict[Priority, int]:
        """Safe to call from another thread."""
        return {p: sum(len(lane.waiting) for lane in list(lanes.values())) for p, lanes in self._active.items()}

    def push(self, account: Account, priority: Priority) -> Waiter | None:
        """None if the queue is full of requests that have as much right to wait as this one."""
        key = (priority, account.caller.id)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = Lane(account)
        if self._length >= self._max_length and not self._make_room(lane, priority):
            return None
        if not lane.waiting:
            lane.clock = max(lane.clock, self._now)  # who was away has not saved up turns
            self._active[priority][account.caller.id] = lane
        waiter = Waiter(lane, priority)
        lane.waiting[waiter] = None
        self._length += 1
        return waiter

    def pop(self, may_go: Callable[[Waiter], bool] = lambda waiter: True) -> Waiter | None:
        """The request whose turn it is, None if it may not go: nobody overtakes it, or a large one would wait for ever.

        One whose client just hung up may still stand here: it is left out.
        """
        while (lane := self._next_lane()) is not None:
            waiter = next(iter(lane.waiting))
            if not waiter.verdict.done() and not may_go(waiter):
                return None
            self.remove(waiter)
            if not waiter.verdict.done():
                self._now = max(self._now, lane.clock)
                lane.clock += 1 / lane.account.caller.weight
                return waiter
        return None

    def remove(self, waiter: Waiter) -> None:
        """Does nothing if the request does not wait any more."""
        lane = waiter.lane
        if waiter not in lane.waiting:
            return
        del lane.waiting[waiter]
        self._length -= 1
        if not lane.waiting:
            del self._active[waiter.priority][lane.account.caller.id]

    def _next_lane(self) -> Lane | None:
        lanes = next((lanes for lanes in self._active.values() if lanes), None)
        return None if lanes is None else min(lanes.values(), key=lambda lane: lane.rank)

    def _make_room(self, lane: Lane, priority: Priority) -> bool:
        """Turns away the newest request of whoever has the most waiting, if that has less right to wait than this."""
        for other in sorted(Priority, reverse=True):
            lanes = self._active[other].values()
            if other < priority or not lanes:
                continue
            longest = _longest(lanes)
            grown = (len(lane.waiting) + 1) / lane.account.caller.weight
            if other is priority and longest.length <= grown:
                return False
            waiter = next(reversed(longest.waiting))
            self.remove(waiter)
            if not waiter.verdict.done():
                waiter.verdict.set_result(Verdict.DISPLACED)
            return True
        return False


def _longest(lanes: Collection[Lane]) -> Lane:
    return max(lanes, key=lambda lane: lane.length)
