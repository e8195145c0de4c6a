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
from router.lifetime import RequestRecord
from router.reply import Reply
from router.settings import RouterSettings
from router.terms import Terms
from router.types import Api


def lone_admission(**settings: int) -> Admission:
    return Admission(RouterSettings(**settings), AdmissionMetrics(CollectorRegistry()))  # type: ignore[arg-type]


def admitted(admission: Admission, work: Callable[[], Awaitable[Any]]) -> Coroutine[Any, Any, None]:
    record = RequestRecord("x", Api.COMPLETIONS)
    return admission.run(work, Terms(ANONYMOUS, Priority.NORMAL, None), record, Reply(no_send))


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
