"""What the router believes of a real engine's KV cache is what the engine then finds there."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import requests
import zmq.asyncio

from router.kv_events import EventListener, EventSource
from tests.e2e.processes import Service, start_prefill, start_router, wait_for
from tknp.common.ports import free_port

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


def test_events_say_what_a_prompt_will_find_cached(models: Callable[[str], Path], log_dir: Path) -> None:
    ports = {
        "endpoint": f"tcp://*:{free_port()}",
        "replay_endpoint": f"tcp://*:{free_port()}",
    }
    config = json.dumps({"enable_kv_cache_events": True, "publisher": "zmq", "topic": "kv", **ports})
    engine = start_prefill(models("llama"), log_dir, "--kv-events-config", config, "--enable-prompt-tokens-details")
    router = start_router(log_dir, [], [engine], "--kv-poll-interval", "0.2", "--local-prefill-tokens", "10")
    try:
        engine.wait_ready()
        told = engine.get("/kv_events")
        assert told == {**ports, "topic": "kv", "block_size": BLOCK_SIZE}
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
        router.wait_ready("/ready")
        wait_for(lambda: router.get("/ready")["engines"][0]["kv_ranks"], 10, "the router knowing the engine's free KV")
        (rank,) = router.get("/ready")["engines"][0]["kv_ranks"]
        assert rank["block_size"] == BLOCK_SIZE
        assert rank["num_blocks"] >= rank["num_free_blocks"] > 0
        assert router.post("/v1/completions", {"model": "tiny", "prompt": first, "max_tokens": 4}).status_code == 200
        wait_for(lambda: "by its KV events" in router.log.read_text(), 20, "the router listening")
    finally:
        for service in (router, engine):
            service.stop()
