from __future__ import annotations

import time

from router.lifetime import Moment, Phase, RequestRecord
from router.records import RecordStore
from router.types import Api


def test_a_retry_voids_the_moments_of_the_attempt_before() -> None:
    record = RequestRecord("a", Api.CHAT)
    for moment in (Moment.PREFILL_SENT, Moment.PREFILL_DONE, Moment.DECODE_SENT, Moment.PREFILL_SENT):
        record.mark(moment)
    assert list(record.moments) == [Moment.RECEIVED, Moment.PREFILL_SENT]
    assert record.phases().keys() == {Phase.ROUTE}


def test_moments_are_unix_seconds() -> None:
    assert abs(RequestRecord("a", Api.CHAT).moments[Moment.RECEIVED] - time.time()) < 1


def test_the_store_finds_requests_in_flight_and_finished() -> None:
    store = RecordStore(1)
    first, second = RequestRecord("a", Api.CHAT), RequestRecord("b", Api.CHAT)
    store.begin(first)
    store.begin(second)
    assert store.in_flight() == [first, second]
    store.finish(first)
    assert store.get("a") is first
    store.finish(second)
    assert store.get("a") is None
    assert store.get("b") is second
    assert not store.in_flight()
