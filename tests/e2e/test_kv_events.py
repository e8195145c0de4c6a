"""What the router believes of a real engine's KV cache is what the engine then finds there; and what it makes of it: a
prefill engine pulls from a decode rank what that has of a conversation."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
import zmq.asyncio

from router.kv_events import EventListener, EventSource
from tests.e2e.conftest import Expected
from tests.e2e.processes import Service, kv_event_ports, pulling_back, start_decode, start_prefill, wait_for
from tests.e2e.stack import Stack, running
from tests.e2e.suite import Ask, answers, around_boundaries, completion, crowd, tokens

BLOCK_SIZE = 32  # of the engines here


@contextmanager
def listening(engine: Service) -> Iterator[EventListener]:
    """The router's listener, on a thread."""
    raw = requests.get(engine.url + "/kv_events", timeout=10).content
    loop = asyncio.new_event_loop()
    context = zmq.asyncio.Context()
    listener = EventListener(context, EventSource.parse(engine.url, raw))
    task = loop.create_task(listener.run())
    task.add_done_callback(lambda _: loop.stop())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield listener
        assert not task.done(), task.exception()
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(10)
        context.destroy(linger=0)
        loop.close()


def cached_tokens(engine: Service, prompt: str | list[int]) -> int:
    """As the engine counts those that it did not have to compute."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    usage = engine.post("/v1/completions", body).json()["usage"]
    details = usage["prompt_tokens_details"]
    return 0 if details is None else int(details["cached_tokens"] or 0)


@pytest.fixture(scope="module")
def ports() -> list[dict[str, str]]:
    """Where each engine publishes."""
    return [kv_event_ports() for _ in range(2)]


@pytest.fixture(scope="module")
def stack(models: Callable[[str], Path], log_dir: Path, ports: list[dict[str, str]]) -> Iterator[Stack]:
    """Engines that publish events, and may both pull from the other: one worker, and two ranks of two."""
    options = [pulling_back(own) for own in ports]
    prefill = start_prefill(models("llama"), log_dir, *options[0])
    decode = start_decode(models("llama"), log_dir, 2, "--tensor-parallel-size", "2", *options[1])
    router_options = ("--kv-poll-interval", "0.2", "--health-check-interval", "0.5", "--pull-back-tokens", "64")
    with running(prefill, decode, log_dir, *router_options) as stack:
        yield stack


def test_events_say_what_a_prompt_will_find_cached(stack: Stack, ports: list[dict[str, str]]) -> None:
    engine = stack.prefill
    told = [engine.get("/kv_events") for engine in (stack.prefill, stack.decode)]
    assert told == [{**own, "topic": "kv", "block_size": BLOCK_SIZE} for own in ports]
    first = [5 + i % 90 for i in range(200)]
    text = "A sentence that takes more than one block of the cache. " * 4
    assert cached_tokens(engine, first) == 0  # before anybody listens
    with listening(engine) as listener:
        wait_for(lambda: listener.index.match(first) == 192, 20, "the replay of what was stored before")
        ids = requests.post(engine.url + "/tokenize", json={"model": "tiny", "prompt": text}, timeout=60).json()
        assert cached_tokens(engine, text) == 0
        full = len(ids["tokens"]) // BLOCK_SIZE * BLOCK_SIZE
        assert full > 0
        wait_for(lambda: listener.index.match(ids["tokens"]) == full, 20, "the text's blocks")
        for prompt in (first, [*first, 7, 8], [*first[:100], *range(5, 90)], [9, *first], ids["tokens"]):
            expected = min(listener.index.match(prompt), (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE)
            assert cached_tokens(engine, prompt) == expected
        engine.post("/reset_prefix_cache", {})
        assert cached_tokens(engine, [9] * 40) == 0  # the event comes with the next step
        wait_for(lambda: listener.index.match(first) == 0, 20, "the reset")
        assert listener.index.match([9] * 40) == BLOCK_SIZE


def test_prefill_on_one_gpu_decode_on_two_by_two(stack: Stack, plain_llama: Expected) -> None:
    asks = [*around_boundaries(seed=1), *crowd(seed=2)[:8]]
    assert answers(stack.router, asks, 8) == plain_llama(asks)
    ranks = [rank["rank"] for rank in stack.ranks()]
    assert ranks == [0, 0, 1, 1], "worker rank = token-parallel rank x tensor-parallel size + tensor-parallel rank"
    stack.wait_idle()


def test_the_router_knows_the_rooms_of_ranks_and_listens(stack: Stack) -> None:
    def ranks() -> list[dict[str, int]]:
        found: list[dict[str, int]] = [
            r for e in stack.router.get("/ready")["engines"] for r in e.get("kv_ranks") or ()
        ]
        return found

    wait_for(ranks, 10, "the router knowing the engine's free KV")
    assert len(ranks()) == 2
    for rank in ranks():
        assert rank["block_size"] == BLOCK_SIZE
        assert rank["num_blocks"] >= rank["num_free_blocks"] > 0
    wait_for(lambda: stack.router.log.read_text().count("by its KV events") == 2, 20, "the router listening to both")


def test_a_conversations_last_turn_is_pulled_from_the_rank_that_has_it(stack: Stack) -> None:
    """The answers are those of plain vLLM that computes all of it; the prefill engine computes what is new."""
    first = [completion(tokens(100 + 13 * i, 41), 150) for i in range(6)]
    answered = answers(stack.router, first, 6)
    assert answered == fresh(stack, first)
    talks = [ask.body["prompt"] + of_ask[0] for ask, of_ask in zip(first, answered, strict=True)]
    again = [completion(talk + tokens(50, 42 + i), 30) for i, talk in enumerate(talks)]
    time.sleep(1)  # until the router has heard of the last blocks
    computed = stack.prefill.metric("vllm:request_prefill_kv_computed_tokens_sum")
    second = answers(stack.router, again, 6)
    assert stack.router.metric("tknp_pull_backs_total") == len(again)
    assert stack.router.metric("tknp_pull_backs_total", end="kept") == len(again)
    computed = stack.prefill.metric("vllm:request_prefill_kv_computed_tokens_sum") - computed
    assert computed <= len(again) * (50 + BLOCK_SIZE), "the rest was pulled"
    assert stack.prefill.metric("tknp_kv_transfer_bytes_total") > 0
    stack.wait_idle(10)  # by the pulls: a lease that nobody ends lasts 30 s
    assert second == fresh(stack, again)
    assert not stack.router.metric("tknp_kv_leases_total"), "none was kept in vain"


def fresh(stack: Stack, asks: list[Ask]) -> list[list[list[int]]]:
    """What the prefill engine answers that has nothing cached, neither before nor after."""
    forget(stack)
    found = stack.expected(asks, 6)
    forget(stack)
    return found


def forget(stack: Stack) -> None:
    stack.wait_idle()
    stack.prefill.post("/reset_prefix_cache", {})
    assert cached_tokens(stack.prefill, [9] * 40) == 0  # the event comes with the next step
