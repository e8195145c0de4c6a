"""Admission by itself: the way that costs nothing, and slots that come too late."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from router.admission import Admission
from router.admission_metrics import AdmissionMetrics
from router.callers import ANONYMOUS, Priority
from router.errors import Overloaded
from router.lifetime import RequestRecord
from router.reply import Reply
from router.settings import RouterSettings
from router.terms import Terms
from router.types import Api, Rejection


def lone_admission(**settings: int) -> Admission:
    return Admission(RouterSettings(**settings), AdmissionMetrics(CollectorRegistry()))  # type: ignore[arg-type]


def admitted(
    admission: Admission,
    work: Callable[[], Awaitable[Any]],
    fits: Callable[[], bool] = lambda: True,
    deadline: float | None = None,
) -> Coroutine[Any, Any, None]:
    record = RequestRecord("x", Api.COMPLETIONS)
    return admission.run(work, Terms(ANONYMOUS, Priority.NORMAL, deadline), record, Reply(no_send), fits)


async def no_send(message: object) -> None:
    raise AssertionError("admission itself sends nothing")


def test_who_finds_room_does_not_pass_through_the_event_loop() -> None:
    async def check() -> None:
        admission = lone_admission()
        passed = []

        async def work() -> None:
            passed.append(admission.num_in_flight)

        with pytest.raises(StopIteration):  # it ran to its end without ever having given up control
            admitted(admission, work).send(None)
        assert passed == [1]
        assert admission.num_in_flight == 0

    asyncio.run(check())


def test_a_slot_that_comes_too_late_is_passed_on() -> None:
    """The client hangs up in the same turn of the event loop in which its slot is given to it."""

    async def check() -> None:
        admission = lone_admission(max_requests_in_flight=1)
        may_end, order = asyncio.Event(), []

        async def end_then_hang_up() -> None:
            await admitted(admission, may_end.wait)
            late.cancel()

        async def other(name: str) -> None:
            order.append(name)

        running = asyncio.create_task(end_then_hang_up())
        await asyncio.sleep(0)
        late, following = (
            asyncio.create_task(admitted(admission, partial(other, name))) for name in ("late", "following")
        )
        await asyncio.sleep(0)
        assert len(admission.queue) == 2
        may_end.set()
        await running
        with pytest.raises(asyncio.CancelledError):
            await late
        await asyncio.wait_for(following, 10)
        assert order == ["following"]
        assert (admission.num_in_flight, len(admission.queue)) == (0, 0)
        (account,) = admission.accounts.values()
        assert account.num_open == account.num_in_flight == 0

    asyncio.run(check())


def test_a_request_waits_for_room_and_nobody_overtakes_it() -> None:
    async def check() -> None:
        admission, has_room, order = lone_admission(), False, []

        async def note(name: str) -> None:
            order.append(name)

        large = asyncio.create_task(admitted(admission, partial(note, "large"), lambda: has_room))
        await asyncio.sleep(0)
        small = asyncio.create_task(admitted(admission, partial(note, "small")))
        await asyncio.sleep(0.5)
        assert order == [] and len(admission.queue) == 2, "the small one would fit, and has to wait"
        has_room = True
        await asyncio.gather(large, small)
        assert order == ["large", "small"]
        assert admission.num_in_flight == len(admission.queue) == 0

    asyncio.run(check())


def test_a_deadline_that_passes_before_the_turn_is_refused_at_once() -> None:
    async def check() -> None:
        admission = lone_admission(max_requests_in_flight=1)
        now = asyncio.get_running_loop().time
        await admitted(admission, partial(asyncio.sleep, 0.5))  # from now on it knows how long requests take
        may_end = asyncio.Event()
        running = asyncio.create_task(admitted(admission, may_end.wait))
        await asyncio.sleep(0)
        begin = now()
        with pytest.raises(Overloaded, match=r"its deadline in 0\.\d s") as refused:
            await admitted(admission, may_end.wait, deadline=begin + 0.2)
        assert refused.value.reason is Rejection.DEADLINE and not len(admission.queue)
        patient = asyncio.create_task(admitted(admission, may_end.wait, deadline=begin + 60))
        await asyncio.sleep(0)
        assert len(admission.queue) == 1
        may_end.set()
        await asyncio.gather(running, patient)

    asyncio.run(check())
