"""Real engines behind a busy router, watched by a real Prometheus."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.deploy.prometheus import Prometheus, run_prometheus
from tests.e2e.processes import Service, start_router
from tests.e2e.suite import completion, conversations, tokens

NUM_CLIENTS = 6
# Fewer may be with the engines than there are clients, so that some wait and a few are turned away.
BUSY = ("--max-requests-in-flight=4", "--max-queue-length=1", "--guard-share=0.3", "--flip-roles")
TURNED_AWAY = 503


@contextmanager
def watched(prefill: Service, decode: Service, folder: Path) -> Iterator[Prometheus]:
    """A router of its own in front of the two engines, with clients that ask all the time, until the block ends."""
    router = start_router(folder, [prefill], [decode], *BUSY)
    try:
        router.wait_whole()
        with run_prometheus(folder, router.url) as prometheus, _clients(router):
            yield prometheus
    finally:
        router.stop()


@contextmanager
def _clients(router: Service) -> Iterator[None]:
    is_over = threading.Event()
    failures: list[BaseException] = []

    def run(client: int) -> None:
        rng = random.Random(client)
        try:
            while not is_over.is_set():
                if rng.choice(KINDS)(router, rng) == TURNED_AWAY:
                    is_over.wait(0.5)  # s; as a well-behaved client does
        except BaseException as failure:  # noqa: BLE001 - raised below, in the thread of the test
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(client,)) for client in range(NUM_CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join(120)
    if failures:
        raise failures[0]


def _stream(router: Service, rng: random.Random) -> int:
    """Prompts of which many begin alike."""
    prompt = tokens(64, rng.randint(1, 3)) + tokens(rng.randint(1, 400), rng.randint(1, 10**6))
    body = completion(prompt, rng.randint(8, 60)).body | {"stream": True}
    with router.post("/v1/completions", body, stream=True) as reply:
        assert reply.status_code in (200, TURNED_AWAY), reply.text
        for _ in reply.iter_lines():
            pass
        return reply.status_code


def _whole(router: Service, rng: random.Random) -> int:
    """Without token ids, which the guard does not compare."""
    body = rng.choice(conversations()).body | {"return_token_ids": False}
    reply = router.post("/v1/chat/completions", body)
    assert reply.status_code in (200, TURNED_AWAY), reply.text
    return reply.status_code


def _two_prompts(router: Service, rng: random.Random) -> int:
    """The decode engine computes them by itself."""
    body = {"model": "tiny", "prompt": [tokens(20, rng.randint(1, 99)), tokens(30, 2)], "max_tokens": 8}
    reply = router.post("/v1/completions", body)
    assert reply.status_code in (200, TURNED_AWAY), reply.text
    return reply.status_code


def _refused(router: Service, rng: random.Random) -> int:
    """By the engine, which knows what the router does not."""
    reply = router.post("/v1/completions", completion(tokens(9, 9), 4, logit_bias={"no id": 1}).body)
    assert reply.status_code in (400, TURNED_AWAY), reply.text
    return reply.status_code


# Each asks once, and returns the status of the answer.
KINDS: tuple[Callable[[Service, random.Random], int], ...] = (
    *(_stream,) * 6,
    *(_whole,) * 2,
    _two_prompts,
    _refused,
)
