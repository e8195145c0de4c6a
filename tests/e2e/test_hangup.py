"""A client that hangs up, in each phase of its request's life, on real engines: within seconds, and long before vLLM's
lease of 30 s ends, no block is held on either side."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import requests

from tests.e2e import expected
from tests.e2e.conftest import Expected
from tests.e2e.processes import Service, start_decode, start_prefill, start_router, wait_for
from tests.e2e.stack import Stack
from tests.e2e.suite import Ask, Streamed, answer_streamed, completion, streamed, tokens
from tknp.launch.guard import descendants

SOON = 4.0
"""Seconds; it is to take less than one, and does on a machine that has time for it: what it took is printed. Less than
the 5 s after which a worker of vLLM's looks again for a message that it missed."""


@pytest.fixture(scope="module")
def stacks(models: Callable[[str], Path], log_dir: Path) -> Iterator[tuple[Stack, Service]]:
    """A stack with token-parallel decode, and a second decode engine, of which the router knows too."""
    model = models("llama")
    prefill, decode = start_prefill(model, log_dir), start_decode(model, log_dir, 2)
    spare = start_decode(model, log_dir, 1, name="spare")
    router = start_router(log_dir, [prefill], [decode, spare])
    try:
        for engine in (prefill, decode, spare):
            engine.wait_ready()
        router.wait_whole()
        wait_for(lambda: all(e["up"] for e in router.get("/ready")["engines"]), 60, "every engine being up")
        yield Stack(prefill, decode, router), spare
    finally:
        for service in (router, spare, decode, prefill):
            service.stop()


@contextmanager
def only(stack: Stack, spare: Service) -> Iterator[Stack]:
    """Requests go to the token-parallel engine."""
    name = spare.url.removeprefix("http://")
    requests.post(f"{stack.router.url}/admin/engines/{name}/drain", timeout=10).raise_for_status()
    try:
        yield stack
    finally:
        requests.post(f"{stack.router.url}/admin/engines/{name}/resume", timeout=10).raise_for_status()


class Client:
    """Sends one request over a connection that it can cut."""

    def __init__(self, stack: Stack, ask: Ask, name: str, stream: bool) -> None:
        self._stack = stack
        self.name = name
        body = json.dumps({**ask.body, "stream": stream}).encode()
        self._socket = socket.create_connection(("127.0.0.1", stack.router.port), timeout=60)
        head = f"POST {ask.path} HTTP/1.1\r\nHost: x\r\nX-Request-Id: {name}\r\nContent-Length: {len(body)}\r\n\r\n"
        self._socket.sendall(head.encode() + body)

    def wait_for_moment(self, moment: str) -> None:
        url = f"{self._stack.router.url}/requests/{self.name}"
        wait_for(lambda: moment in requests.get(url, timeout=10).json().get("moments", ()), 60, moment, 0.01)

    def hang_up(self) -> None:
        self._socket.close()


@contextmanager
def paused(service: Service) -> Iterator[None]:
    """Stops the engine's HTTP server; its scheduler and workers go on."""
    with stopped(service.server_pid()):
        yield


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def freed_soon(stack: Stack, what: str) -> Iterator[None]:
    """In the block the client hangs up; from its end on, every block of both pools has to be free within SOON."""
    yield
    begin = time.monotonic()
    stack.wait_idle(SOON, pause=0.02)
    print(f"{what}: every block free on both sides {time.monotonic() - begin:.2f} s after the hang-up")


def core_pid(service: Service) -> int:
    """Its scheduler's process."""
    (pid,) = (p for p in descendants(service.process.pid) if b"EngineCore" in Path(f"/proc/{p}/cmdline").read_bytes())
    return pid


LONG = 900  # tokens, in chunks of 64: a prefill that takes a while


@pytest.mark.parametrize("stream", [True, False])
def test_during_prefill(stacks: tuple[Stack, Service], stream: bool) -> None:
    with only(*stacks) as stack:
        client = Client(stack, completion(tokens(LONG, 1), 8), f"in-prefill-{stream}", stream)
        client.wait_for_moment("prefill_sent")
        with freed_soon(stack, client.name):
            client.hang_up()
        assert stack.router.get(f"/requests/{client.name}")["outcome"] == "cancelled"


def test_between_the_end_of_prefill_and_its_answer(stacks: tuple[Stack, Service]) -> None:
    """The engine has computed the prompt and keeps its KV; the answer that says where never arrives."""
    with only(*stacks) as stack:
        before = stack.prefill.metric("vllm:prefix_cache_queries_total")
        with ExitStack() as server:
            with stopped(core_pid(stack.prefill)):
                client = Client(stack, completion(tokens(LONG, 2), 8), "prefill-unheard", True)
                client.wait_for_moment("prefill_sent")
                time.sleep(1.0)  # until the server has passed the request on to the core
                server.enter_context(freed_soon(stack, client.name))
                server.enter_context(paused(stack.prefill))
            time.sleep(3.0)
            client.hang_up()
            time.sleep(0.3)
        assert stack.prefill.metric("vllm:prefix_cache_queries_total") >= before + LONG, "it was never computed"
        assert stack.prefill.metric("vllm:nixl_num_kv_expired_reqs_total") == 0


def test_before_the_decode_engine_has_taken_the_request(stacks: tuple[Stack, Service]) -> None:
    """The decode engine's server finds a request and its hang-up together, and tells nobody."""
    with only(*stacks) as stack:
        with freed_soon(stack, "decode-untaken"), paused(stack.decode):
            client = Client(stack, completion(tokens(LONG, 3), 8), "decode-untaken", True)
            client.wait_for_moment("decode_sent")
            client.hang_up()
            time.sleep(0.3)
        released = stack.router.metric("tknp_kv_leases_total", end="released")
        assert released >= 1
        assert stack.prefill.metric("vllm:nixl_num_kv_expired_reqs_total") == 0


@pytest.mark.parametrize("stream", [True, False])
def test_while_decode_runs(stacks: tuple[Stack, Service], stream: bool) -> None:
    with only(*stacks) as stack:
        client = Client(stack, completion(tokens(100, 4), 800), f"in-decode-{stream}", stream)
        client.wait_for_moment("first_token" if stream else "decode_sent")
        if not stream:
            wait_for(lambda: any(r["num_requests"] for r in stack.ranks()), 30, "the request running")
        with freed_soon(stack, client.name):
            client.hang_up()


def test_streams_outlive_their_decode_engine(
    stacks: tuple[Stack, Service], plain_llama: Expected, plain_streams: list[Streamed]
) -> None:
    """The last test of this file: it kills a decode engine."""
    stack, _ = stacks
    asks, told = expected.long_streams(), expected.told_streams()
    num_streams = len(asks) + len(told)
    with ThreadPoolExecutor(num_streams) as pool:
        with only(*stacks):
            streams = [pool.submit(answer_streamed, stack.router, ask) for ask in asks]
            told_streams = [pool.submit(streamed, stack.router, ask) for ask in told]
            wait_for(lambda: sum(r["num_requests"] for r in stack.ranks()) == num_streams, 60, "the streams running")
            time.sleep(0.5)
        os.kill(stack.ranks()[1]["pid"], signal.SIGKILL)
        got = [stream.result(120) for stream in streams]
        got_told = [stream.result(120) for stream in told_streams]
    assert got == plain_llama(asks), "the other engine should have gone on with them"
    for one, plain in zip(got_told, plain_streams, strict=True):
        assert one.logprobs == pytest.approx(plain.logprobs, abs=1e-3)
        one.usage.pop("prompt_tokens_details")  # plain vLLM does not tell what was cached
        assert replace(one, logprobs=[]) == replace(plain, logprobs=[])
    assert plain_streams[0].end == ("stop", " abo value"), "a stop string should end the answer where it can"
    assert stack.router.metric("tknp_stream_continuations_total") == num_streams
    wait_for(lambda: stack.prefill.metric("vllm:kv_cache_usage_perc") == 0, 60, "the prefill engine's pool being empty")
