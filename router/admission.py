"""Admission: how many requests the engines have at once, who waits, and who is turned away.

A request that finds room passes without a task, a timer or a turn of the event loop. One that does not waits in a
FairQueue until a slot is handed to it, its time is over, somebody with more right to the place comes, or its client
hangs up. Which it is stands in one future per waiting request.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from router.errors import ClientStalled, DeadlineExceeded, Overloaded
from router.fair_queue import Account, FairQueue, Verdict, Waiter
from router.lifetime import Moment
from router.types import Rejection

if TYPE_CHECKING:
    from router.admission_metrics import AdmissionMetrics
    from router.callers import Caller
    from router.lifetime import RequestRecord
    from router.reply import Reply
    from router.settings import RouterSettings
    from router.terms import Terms

Work = Callable[[], Awaitable[object]]
Fits = Callable[[], bool]

MAX_RETRY_AFTER = 60  # s; load changes faster than an estimate over more than that is worth
LOOK_INTERVAL = 0.2  # s between two looks whether engines have room for the next in the queue
SMOOTHING = 0.05  # weight of the newest request in the mean duration: the last 20 or so count


class Admission:
    def __init__(self, settings: RouterSettings, metrics: AdmissionMetrics) -> None:
        self.max_in_flight = settings.max_requests_in_flight
        self.num_in_flight = 0
        self.queue = FairQueue(settings.max_queue_length)
        self.accounts: dict[bytes, Account] = {}  # one for each caller that ever came
        self._queue_timeout = settings.queue_timeout
        self._max_per_key = settings.max_requests_per_key
        self._metrics = metrics
        self._mean_seconds: float | None = None  # that requests are in flight; None before the first has ended
        self._next_look: asyncio.TimerHandle | None = None
        self._now = asyncio.get_running_loop().time

    async def run(
        self, work: Work, terms: Terms, record: RequestRecord, reply: Reply, fits: Fits = lambda: True
    ) -> None:
        """Awaits `work()` when its turn comes. Raises Overloaded, DeadlineExceeded, or what the work raises.

        `fits` says whether the engines have room for the request now; it waits for that, too.
        """
        account = self._open_account(terms)
        try:
            if self.num_in_flight < self.max_in_flight and not len(self.queue) and fits():
                self.num_in_flight += 1
                account.num_in_flight += 1
            else:
                await self._wait(account, terms, record, fits)
            begin = self._now()
            try:
                await (work() if terms.deadline is None else _within(terms.deadline, work, reply))
            finally:
                self._note_duration(self._now() - begin)
                self._give_back_slot(account)
        except Overloaded as error:
            self._metrics.rejected(terms.priority, error.reason)
            raise
        finally:
            account.num_open -= 1

    def retry_after(self, num_ahead: int, num_slots: int) -> int:
        """Seconds until a slot is likely to be free, by Little's law from how long requests took lately."""
        expected = (num_ahead + 1) * (self._mean_seconds or 0.0) / num_slots
        return min(MAX_RETRY_AFTER, max(1, math.ceil(expected)))

    def _open_account(self, terms: Terms) -> Account:
        caller = terms.caller
        account = self.accounts.get(caller.id)
        if account is None:
            account = self.accounts[caller.id] = Account(caller)
        account.caller = caller
        limit = caller.max_requests or self._max_per_key
        if limit is not None and account.num_open >= limit:
            self._metrics.rejected(terms.priority, Rejection.KEY_LIMIT)
            raise _too_many(caller, limit, self.retry_after(0, limit))
        account.num_open += 1
        return account

    async def _wait(self, account: Account, terms: Terms, record: RequestRecord, fits: Fits) -> None:
        """Returns with a slot, whose number is already counted. However else it ends, the request waits no more."""
        begin = self._now()
        self._refuse_in_vain(terms, begin)
        waiter = self.queue.push(account, terms.priority)
        if waiter is None:
            message = f"The router is full: {self.num_in_flight} requests run and {len(self.queue)} wait."
            raise self._overloaded(message, Rejection.QUEUE_FULL)
        waiter.fits = fits
        record.mark(Moment.QUEUED)
        self._hand_out_slots()
        latest = begin + self._queue_timeout
        deadline = math.inf if terms.deadline is None else terms.deadline
        has_slot = False
        try:
            async with asyncio.timeout_at(min(latest, deadline)):
                has_slot = await waiter.verdict is Verdict.ADMITTED
        except TimeoutError as error:
            if deadline < latest:
                self._metrics.rejected(terms.priority, Rejection.DEADLINE)
                raise DeadlineExceeded("The request's deadline (X-Request-Timeout) passed in the queue.") from error
            message = f"The request waited {self._now() - begin:.1f} s for its turn."
            raise self._overloaded(message, Rejection.QUEUE_TIMEOUT) from error
        finally:
            if not has_slot:
                self._withdraw(waiter)
        if not has_slot:
            raise self._overloaded("The queue is full, and others came before this request.", Rejection.DISPLACED)
        record.mark(Moment.ADMITTED)
        self._metrics.waited(terms.priority, self._now() - begin)

    def _refuse_in_vain(self, terms: Terms, now: float) -> None:
        """A request whose deadline will have passed before its turn comes would only keep others waiting."""
        if terms.deadline is None:
            return
        num_ahead = sum(num for priority, num in self.queue.lengths().items() if priority <= terms.priority)
        expected = (num_ahead + 1) * (self._mean_seconds or 0.0) / self.max_in_flight
        if expected > (left := terms.deadline - now):
            message = f"The request's turn would come in about {expected:.1f} s, its deadline in {left:.1f} s."
            raise self._overloaded(message, Rejection.DEADLINE)

    def _withdraw(self, waiter: Waiter) -> None:
        """For a wait that ended without a slot, or so late that nobody is there to use it."""
        self.queue.remove(waiter)
        verdict = waiter.verdict
        if verdict.done() and not verdict.cancelled() and verdict.result() is Verdict.ADMITTED:
            self._give_back_slot(waiter.lane.account)

    def _give_back_slot(self, account: Account) -> None:
        account.num_in_flight -= 1
        self.num_in_flight -= 1
        if len(self.queue):
            self._hand_out_slots()

    def _hand_out_slots(self) -> None:
        """To those whose turn it is, as long as there are slots and the engines have room."""
        while self.num_in_flight < self.max_in_flight and (following := self.queue.pop(_has_room)) is not None:
            self.num_in_flight += 1
            following.lane.account.num_in_flight += 1
            following.verdict.set_result(Verdict.ADMITTED)
        # Room can come without a request's end here: another router's ended, or an engine told of its cache.
        if len(self.queue) and self.num_in_flight < self.max_in_flight and self._next_look is None:
            self._next_look = asyncio.get_running_loop().call_later(LOOK_INTERVAL, self._look_again)

    def _look_again(self) -> None:
        self._next_look = None
        self._hand_out_slots()

    def _overloaded(self, message: str, reason: Rejection) -> Overloaded:
        return Overloaded(message, reason, retry_after=self.retry_after(len(self.queue), self.max_in_flight))

    def _note_duration(self, seconds: float) -> None:
        mean = self._mean_seconds
        self._mean_seconds = seconds if mean is None else mean + SMOOTHING * (seconds - mean)


async def _within(deadline: float, work: Work, reply: Reply) -> None:
    try:
        async with asyncio.timeout_at(deadline) as limit:
            await work()
    except TimeoutError as error:
        if not limit.expired():
            raise
        if reply.is_sending:
            raise ClientStalled("The client stopped reading the stream.") from error
        raise DeadlineExceeded("The request's deadline (X-Request-Timeout) passed before its answer's end.") from error


def _has_room(waiter: Waiter) -> bool:
    return waiter.fits()


def _too_many(caller: Caller, limit: int, retry_after: int) -> Overloaded:
    whose = "Callers without an API key have" if caller.name == "anonymous" else "This API key has"
    return Overloaded(
        f"{whose} {limit} requests here, which is the limit.", Rejection.KEY_LIMIT, retry_after=retry_after
    )
