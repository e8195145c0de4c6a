"""What the decode engines tell of hand-offs, asked for afterwards and many at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from tests.router.conftest import Stack, StartStack
from tests.router.running import wait_for
from tests.router.scripted_engine import answer_decode


def test_requests_that_end_together_are_asked_for_together(stack: Stack) -> None:
    with ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(lambda _: stack.router.complete(), range(60)))
    wait_for(lambda: stack.router.metric("tknp_router_kv_transfer_bytes_total") == 60 * 4096)
    asked = stack.decode[0].asked_transfers
    assert sorted(name for question in asked for name in question) == sorted(a.headers["x-request-id"] for a in answers)
    assert len(asked) < 20


def test_what_the_engine_does_not_know_yet_is_asked_for_again_and_not_for_ever(stack: Stack) -> None:
    async def forget(engine, request, seen):  # type: ignore[no-untyped-def]
        answer = await answer_decode(engine, request, seen)
        engine.transfers.clear()
        return answer

    stack.decode[0].behaviour = forget
    unknown = stack.router.complete().headers["x-request-id"]
    wait_for(lambda: len(stack.decode[0].asked_transfers) == 3)
    assert stack.decode[0].asked_transfers == [[unknown]] * 3
    stack.decode[0].behaviour = answer_decode
    stack.router.complete()
    wait_for(lambda: stack.router.metric("tknp_router_kv_transfer_bytes_total") == 4096)


def test_nonsense_costs_the_record_and_nothing_else(start_stack: StartStack) -> None:
    stack = start_stack()

    async def lie(engine, request, seen):  # type: ignore[no-untyped-def]
        answer = await answer_decode(engine, request, seen)
        for told in engine.transfers.values():
            told["transfer_begin"] = None
        return answer

    stack.decode[0].behaviour = lie
    answer = stack.router.complete()
    wait_for(lambda: stack.decode[0].asked_transfers)
    assert stack.router.record(answer)["kv_transfer"] is None
    assert stack.router.complete().status == 200
