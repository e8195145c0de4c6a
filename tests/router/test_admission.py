"""Admission in front of scripted engines: who waits, who is turned away, and that nobody is left over."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import aiohttp
import pytest

from tests.router.conftest import Stack, StartStack
from tests.router.running import Answer, wait_for
from tests.router.scripted_engine import MODEL, answer_decode, answer_prefill, chunk, raw_stream, slow, stall

KEYS = """
[[keys]]
name = "a"
key = "sk-aaaaaaaa"
[[keys]]
name = "b"
key = "sk-bbbbbbbb"
max_requests = 2
[[keys]]
name = "vip"
key = "sk-vvvvvvvv"
priority = "high"
"""


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(20) as threads:
        yield threads


class Gated:
    """Prefill engines that answer when the test says so, in the order in which requests came."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.is_open = threading.Event()
        stack.prefill[0].behaviour = self._behave

    async def _behave(self, engine, request, seen):  # type: ignore[no-untyped-def]
        await asyncio.to_thread(self.is_open.wait, 60)
        return await answer_prefill(engine, request, seen)

    def wait_queued(self, count: int) -> None:
        wait_for(lambda: len(self.stack.router.state.admission.queue) == count)


def assert_empty(stack: Stack) -> None:
    wait_for(stack.router.is_idle)
    admission = stack.router.state.admission
    assert (admission.num_in_flight, len(admission.queue)) == (0, 0)
    assert all(a.num_open == a.num_in_flight == 0 for a in admission.accounts.values())
    assert stack.router.metric("tknp_admitted_requests") == 0


def ask(stack: Stack, pool: ThreadPoolExecutor, headers: dict[str, str] | None = None) -> Future[Answer]:
    return pool.submit(stack.router.complete, headers)


def bearer(letter: str) -> dict[str, str]:
    return {"Authorization": f"Bearer sk-{letter * 8}"}


def test_what_has_no_room_waits_for_its_turn(start_stack: StartStack, pool: ThreadPoolExecutor) -> None:
    stack = start_stack(max_requests_in_flight=1)
    gate = Gated(stack)
    first = ask(stack, pool)
    wait_for(lambda: stack.num_seen == 1)
    second = ask(stack, pool, {"X-Request-Id": "second"})
    gate.wait_queued(1)
    assert stack.router.call("GET", "/requests/second").json()["moments"].keys() == {"received", "queued"}
    assert stack.router.metric("tknp_queue_length", priority="normal") == 1
    assert stack.router.metric("tknp_requests_in_flight", phase="queue") == 1
    assert stack.router.metric("tknp_admitted_requests") == stack.router.metric("tknp_admitted_requests_limit") == 1
    assert stack.num_seen == 1
    gate.is_open.set()
    assert first.result(20).status == second.result(20).status == 200
    told = stack.router.record(second.result())
    assert list(told["moments"])[:4] == ["received", "queued", "admitted", "prefill_sent"]
    assert 0 < told["phases"]["queue"] <= told["phases"]["route"]
    assert "queued" not in stack.router.record(first.result())["moments"]
    assert stack.router.metric("tknp_queue_wait_seconds_count", priority="normal") == 1
    assert_empty(stack)


def test_a_full_queue_is_a_503_with_retry_after(start_stack: StartStack, pool: ThreadPoolExecutor) -> None:
    stack = start_stack(max_requests_in_flight=1, max_queue_length=1)
    gate = Gated(stack)
    answers = [ask(stack, pool)]
    wait_for(lambda: stack.num_seen == 1)
    answers.append(ask(stack, pool))
    gate.wait_queued(1)
    refused = stack.router.complete()
    assert (refused.status, refused.error["code"]) == (503, "overloaded")
    assert refused.error["type"] == "service_unavailable_error"
    assert "1 requests run and 1 wait" in refused.error["message"]
    assert int(refused.headers["retry-after"]) >= 1
    assert stack.router.metric("tknp_rejected_requests_total", priority="normal", reason="queue_full") == 1
    assert stack.router.metric("tknp_requests_total", endpoint="/v1/completions", outcome="overloaded") == 1
    gate.is_open.set()
    assert [answer.result(20).status for answer in answers] == [200, 200]
    assert_empty(stack)


def test_retry_after_is_what_requests_took(start_stack: StartStack) -> None:
    stack = start_stack(max_requests_in_flight=2)
    admission = stack.router.state.admission
    assert admission.retry_after(5, 2) == 1  # nothing is known yet
    stack.prefill[0].behaviour = slow(1.2)
    stack.router.complete()
    assert admission.retry_after(0, 2) == 1
    assert admission.retry_after(9, 2) in (6, 7)  # ten requests of 1.2 s or little more, two at a time
    assert admission.retry_after(100_000, 2) == 60


def test_nobody_waits_longer_than_the_setting(start_stack: StartStack, pool: ThreadPoolExecutor) -> None:
    stack = start_stack(max_requests_in_flight=1, queue_timeout=0.3)
    gate = Gated(stack)
    first = ask(stack, pool)
    wait_for(lambda: stack.num_seen == 1)
    begin = time.monotonic()
    refused = stack.router.complete()
    assert 0.3 <= time.monotonic() - begin < 3
    assert (refused.status, refused.error["code"]) == (503, "overloaded")
    assert "waited 0.3 s" in refused.error["message"]
    assert stack.router.metric("tknp_rejected_requests_total", priority="normal", reason="queue_timeout") == 1
    gate.is_open.set()
    assert first.result(20).status == 200
    assert_empty(stack)


def test_a_client_that_hangs_up_in_the_queue_leaves_it_at_once(
    start_stack: StartStack, pool: ThreadPoolExecutor
) -> None:
    stack = start_stack(max_requests_in_flight=1)
    gate = Gated(stack)
    first = ask(stack, pool)
    wait_for(lambda: stack.num_seen == 1)
    raw = stack.router.open_stream()
    gate.wait_queued(1)
    raw.close()
    begin = time.monotonic()
    gate.wait_queued(0)
    assert time.monotonic() - begin < 1
    gate.is_open.set()
    assert first.result(20).status == 200
    assert_empty(stack)
    assert stack.num_seen == 2  # both legs of the first, none of the other
    assert stack.router.metric("tknp_requests_total", endpoint="/v1/completions", outcome="cancelled") == 1


def test_a_shutdown_tells_those_who_wait(start_stack: StartStack, pool: ThreadPoolExecutor) -> None:
    stack = start_stack(max_requests_in_flight=1, shutdown_timeout=1.0)
    gate = Gated(stack)
    both = [ask(stack, pool)]
    wait_for(lambda: stack.num_seen == 1)
    both.append(ask(stack, pool))
    gate.wait_queued(1)
    stack.router.server.should_exit = True
    assert [(one.result(20).status, one.result().error["code"]) for one in both] == [(503, "router_shutting_down")] * 2
    gate.is_open.set()
    admission = stack.router.state.admission
    assert (admission.num_in_flight, len(admission.queue)) == (0, 0)
    assert stack.num_seen == 1


def test_keys_have_fair_shares_and_priorities(
    start_stack: StartStack, pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    (tmp_path / "keys.toml").write_text(KEYS)
    stack = start_stack(max_requests_in_flight=1, api_keys_file=tmp_path / "keys.toml")
    gate = Gated(stack)
    answers = [ask(stack, pool, {**bearer("a"), "X-Request-Id": "first"})]
    wait_for(lambda: stack.num_seen == 1)
    names = ["a1", "a2", "a3", "b1", "low", "vip", "plain"]
    asked = [bearer("a"), bearer("a"), bearer("a"), bearer("b")]
    asked.append({**bearer("b"), "X-Request-Priority": "low"})
    asked.append(bearer("v"))
    asked.append({**bearer("a"), "X-Request-Priority": "high"})  # more than the key is good for
    for index, (name, headers) in enumerate(zip(names, asked, strict=True), 1):
        answers.append(ask(stack, pool, {**headers, "X-Request-Id": name}))
        gate.wait_queued(index)
    assert stack.router.metric("tknp_key_open_requests", key="a") == 5
    gate.is_open.set()
    assert {answer.result(20).status for answer in answers} == {200}
    order = [seen.headers["x-request-id"] for seen in stack.prefill[0].seen]
    assert order[:2] == ["first", "vip"]
    assert order[-1] == "low"
    assert order.index("b1") < order.index("a2") < order.index("a3") < order.index("plain")
    assert_empty(stack)


def test_a_key_has_a_limit_of_its_own(start_stack: StartStack, pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text(KEYS)
    stack = start_stack(max_requests_per_key=3, api_keys_file=tmp_path / "keys.toml")
    gate = Gated(stack)
    answers = [ask(stack, pool, bearer(key)) for key in "aaabb"]
    wait_for(lambda: stack.num_seen == 5)
    for key, limit in (("a", 3), ("b", 2)):
        refused = stack.router.complete(bearer(key))
        assert (refused.status, refused.error["type"]) == (429, "rate_limit_error")
        assert f"{limit} requests here" in refused.error["message"]
        assert int(refused.headers["retry-after"]) >= 1
    assert stack.router.metric("tknp_rejected_requests_total", priority="normal", reason="key_limit") == 2
    gate.is_open.set()
    assert {answer.result(20).status for answer in answers} == {200}
    assert stack.router.complete(bearer("b")).status == 200
    assert_empty(stack)


def test_who_is_displaced_is_told(start_stack: StartStack, pool: ThreadPoolExecutor) -> None:
    stack = start_stack(max_requests_in_flight=1, max_queue_length=1)
    gate = Gated(stack)
    first = ask(stack, pool)
    wait_for(lambda: stack.num_seen == 1)
    low = ask(stack, pool, {"X-Request-Priority": "low"})
    gate.wait_queued(1)
    high = ask(stack, pool, {"X-Request-Priority": "HIGH"})
    assert (low.result(20).status, low.result().error["code"]) == (503, "overloaded")
    assert stack.router.metric("tknp_rejected_requests_total", priority="low", reason="displaced") == 1
    gate.is_open.set()
    assert first.result(20).status == high.result(20).status == 200
    assert_empty(stack)


@pytest.mark.parametrize("phase", ["queue", "prefill", "decode"])
def test_a_deadline_bounds_every_phase(start_stack: StartStack, pool: ThreadPoolExecutor, phase: str) -> None:
    stack = start_stack(max_requests_in_flight=1)
    gate = Gated(stack)
    others = []
    if phase == "queue":
        others.append(ask(stack, pool))
        wait_for(lambda: stack.num_seen == 1)
    elif phase == "decode":
        gate.is_open.set()
        stack.decode[0].behaviour = stall
    begin = time.monotonic()
    refused = stack.router.complete({"X-Request-Timeout": "0.4"})
    assert 0.4 <= time.monotonic() - begin < 3
    assert (refused.status, refused.error["code"]) == (504, "deadline_exceeded")
    if phase == "queue":
        assert stack.router.metric("tknp_rejected_requests_total", priority="normal", reason="deadline") == 1
    else:
        leg = stack.prefill[0] if phase == "prefill" else stack.decode[0]
        assert leg.seen[0].cancelled.wait(5)
    gate.is_open.set()
    assert all(other.result(20).status == 200 for other in others)
    assert stack.router.metric("tknp_requests_total", endpoint="/v1/completions", outcome="timeout") == 1
    assert_empty(stack)


def test_a_deadline_in_mid_stream_ends_it_with_an_error(start_stack: StartStack) -> None:
    stack = start_stack()
    stack.decode[0].behaviour = raw_stream(chunk(0), then="stall")
    answer = stack.router.complete({"X-Request-Timeout": "0.5"}, stream=True)
    assert answer.status == 200
    assert answer.body.startswith(chunk(0) + b'data: {"error"')
    assert b"deadline_exceeded" in answer.body
    assert b"[DONE]" not in answer.body
    assert stack.decode[0].seen[0].cancelled.wait(5)
    assert_empty(stack)


def test_a_deadline_that_is_not_reached_changes_nothing(start_stack: StartStack) -> None:
    stack = start_stack()
    assert stack.router.complete({"X-Request-Timeout": "60"}, stream=True).body.endswith(b"data: [DONE]\n\n")
    assert_empty(stack)


@pytest.mark.parametrize(
    ("name", "value"),
    [("Timeout", v) for v in ("0", "-1", "nan", "inf", "1e9", "soon", "")]
    + [("Priority", v) for v in ("top", "", "1")],
)
def test_bad_terms_are_named(start_stack: StartStack, name: str, value: str) -> None:
    stack = start_stack()
    refused = stack.router.complete({f"X-Request-{name}": value})
    assert (refused.status, refused.error["code"]) == (400, "invalid_value")
    assert f"X-Request-{name}" in refused.error["message"]
    assert stack.num_seen == 0
    assert_empty(stack)


def test_vllms_own_priority_passes_through(start_stack: StartStack) -> None:
    stack = start_stack()
    assert stack.router.complete(priority=7).status == 200
    assert stack.decode[0].seen[0].body["priority"] == 7


async def mixed_load(url: str, count: int) -> list[int]:
    """Statuses; -1 where the client hung up."""

    async def one(session: aiohttp.ClientSession, index: int) -> int:
        headers = {"X-Request-Priority": ("high", "normal", "low")[index % 3]}
        body = {"model": MODEL, "prompt": "hi", "stream": index % 2 == 0}
        timeout = aiohttp.ClientTimeout(total=0.05 + 0.01 * (index % 40) if index % 4 == 0 else 60)
        try:
            async with session.post(f"{url}/v1/completions", json=body, headers=headers, timeout=timeout) as response:
                await response.read()
                return response.status
        except TimeoutError:
            return -1

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        return await asyncio.gather(*(one(session, index) for index in range(count)))


def test_slots_are_all_there_after_hang_ups_and_refusals(start_stack: StartStack) -> None:
    stack = start_stack(max_requests_in_flight=4, max_queue_length=40, queue_timeout=0.5)
    stack.prefill[0].behaviour = slow(0.02)
    stack.decode[0].behaviour = slow(0.02)
    seen_at_once = 0
    is_over = threading.Event()

    def watch() -> None:
        nonlocal seen_at_once
        while not is_over.is_set():
            seen_at_once = max(seen_at_once, sum(e.num_outstanding for e in stack.router.state.pool.engines))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    statuses = asyncio.run(mixed_load(stack.router.url, 200))
    is_over.set()
    watcher.join()
    assert set(statuses) == {200, 503, -1}
    assert 1 < seen_at_once <= 4
    assert_empty(stack)
    stack.prefill[0].behaviour, stack.decode[0].behaviour = answer_prefill, answer_decode
    assert asyncio.run(mixed_load(stack.router.url, 5)).count(200) >= 3
    assert_empty(stack)
