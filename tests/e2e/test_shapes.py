"""Other numbers of ranks, tensor-parallel sizes and attention shapes, and a prefill engine that is stock vLLM."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from tests.e2e import expected
from tests.e2e.conftest import Expected
from tests.e2e.processes import (
    ENGINE_OPTIONS,
    Service,
    start_decode,
    start_prefill,
    start_router,
    wait_for,
)
from tests.e2e.stack import Stack, running
from tests.e2e.suite import Ask, answer, answers, around_boundaries, completion, crowd
from tknp.common.ports import free_port

Models = Callable[[str], Path]


def start_stock_prefill(model: Path, log_dir: Path) -> Service:
    """vLLM's own server with vLLM's own NixlConnector."""
    transfer = json.dumps({"kv_connector": "NixlConnector", "kv_role": "kv_producer", "kv_buffer_device": "cpu"})
    port = free_port()
    module = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--kv-transfer-config", transfer]
    where = ("--model", str(model), "--host", "127.0.0.1", "--port", str(port))
    side_channel = {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
    return Service("stock-prefill", [*module, *where, *ENGINE_OPTIONS], log_dir, port, side_channel)


def test_three_ranks_fed_by_a_stock_prefill_engine(models: Models, log_dir: Path, plain_llama: Expected) -> None:
    model = models("llama")
    # 34 blocks a rank hold one request of the longest kind: the crowd has to wait, and to be preempted, rank by rank.
    decode = start_decode(model, log_dir, 3, "--num-gpu-blocks-override", "102", "--kv-both")
    with running(start_stock_prefill(model, log_dir), decode, log_dir) as stack:
        assert [rank["num_blocks"] for rank in stack.ranks()] == [33, 33, 33], "less one null block each"
        for asks, at_once in ((around_boundaries(seed=1), 2), (crowd(seed=2), 32), (expected.long_answers(), 9)):
            assert answers(stack.router, asks, at_once) == plain_llama(asks)
        preemptions = stack.decode.metric("vllm:num_preemptions_total")
        assert preemptions > 0, "the pools are too large for this test to mean anything"
        assert all(rank["kv_bytes_received"] for rank in stack.ranks())
        stack.wait_idle()


def test_sliding_window_with_two_kv_cache_groups(models: Models, log_dir: Path, plain_gemma: Expected) -> None:
    model = models("gemma2")
    with running(start_prefill(model, log_dir), start_decode(model, log_dir, 2), log_dir) as stack:
        for asks, at_once in ((around_boundaries(seed=3), 1), (crowd(seed=4, count=12), 12)):
            assert answers(stack.router, asks, at_once) == plain_gemma(asks)
        stack.wait_idle()


def test_weights_spread_over_two_by_two(models: Models, log_dir: Path) -> None:
    model = models("two_kv_heads")
    options = ("--tensor-parallel-size", "2", "--token-parallel-weights", "spread", "--num-gpu-blocks-override", "68")
    decode = start_decode(model, log_dir, 2, *options, "--kv-both")
    with running(start_prefill(model, log_dir, "--kv-both"), decode, log_dir) as stack:
        for asks, at_once in (
            (around_boundaries(seed=1), 2),
            (crowd(seed=2)[:12], 12),
            (expected.long_answers(), 9),
        ):
            assert answers(stack.router, asks, at_once) == stack.expected(asks, at_once)
        ranks = stack.ranks()
        assert [rank["rank"] for rank in ranks] == [0, 1, 0, 1], "workers with the same KV head are neighbours"
        assert len({rank["parameter_bytes"] for rank in ranks}) == 1, "each has a quarter of the weights"
        assert all(rank["kv_bytes_received"] for rank in ranks)
        assert stack.decode.metric("vllm:num_preemptions_total") > 0, "the pools are too large"
        check_pulling_back(stack, around_boundaries(seed=1)[10])


def check_pulling_back(stack: Stack, ask: Ask) -> None:
    """A prefill engine that has nothing cached pulls from a rank's workers, and the answer is what it was."""
    expected_answer = answer(stack.router, ask)
    stack.wait_idle()
    stack.prefill.post("/reset_prefix_cache", {})
    assert stack.answer_after_pulling_back(ask, len(ask.body["prompt"]) - 60) == expected_answer
    assert stack.prefill.metric("tknp_kv_transfer_bytes_total") > 0
    stack.wait_idle(10)  # by the pulls: a lease that nobody ends lasts 30 s


LONG = pytest.mark.skipif("TKNP_TEST_LONG" not in os.environ, reason="make test-long runs it")


@LONG  # reading from two workers into one is also what pulling back does below and in test_kv_events.py
def test_prefill_on_two_decode_on_one_by_two(models: Models, log_dir: Path, plain_llama: Expected) -> None:
    model = models("llama")
    prefill = start_prefill(model, log_dir, "--tensor-parallel-size", "2")
    with running(prefill, start_decode(model, log_dir, 2), log_dir) as stack:
        asks = [*around_boundaries(seed=1), *crowd(seed=2)[:8]]
        assert answers(stack.router, asks, 8) == plain_llama(asks)
        stack.wait_idle()


@LONG  # four engines, two minutes
def test_several_engines_of_each_kind(models: Models, log_dir: Path, plain_llama: Expected) -> None:
    model = models("llama")
    prefill = [start_prefill(model, log_dir, *both, name=f"prefill-{i}") for i, both in enumerate(((), ("--kv-both",)))]
    # One decode engine is token-parallel, the other one is plain vLLM with our connector.
    decode = [start_decode(model, log_dir, 1, "--kv-both", name="decode-1"), start_decode(model, log_dir, 2)]
    router = start_router(log_dir, prefill, decode)
    try:
        for engine in (*prefill, *decode):
            engine.wait_ready()
        router.wait_whole()
        asks = [*around_boundaries(seed=1), *crowd(seed=2)[:12]]
        assert answers(router, asks, at_once=8) == plain_llama(asks)
        for role, engines in (("prefill", prefill), ("decode", decode)):
            for engine in engines:
                name = engine.url.removeprefix("http://")
                assert router.metric(f"{role}_requests_total", engine=name, outcome="ok") > 0
        for engine in decode:
            assert engine.metric("tknp_kv_transfer_bytes_total") > 0
        assert [engine.get("/kv_roles")["roles"] for engine in (*prefill, *decode)] == [
            ["prefill"],
            ["prefill", "decode"],
            ["prefill", "decode"],
            ["decode"],
        ]
        # In one router every load is too much for the prefill pool, in the other one for the decode pool.
        for role, engine, limits in (
            ("prefill", decode[0], ("--flip-prefill-tokens", "1", "--flip-decode-kv", "2")),
            ("decode", prefill[1], ("--flip-prefill-tokens", "1000000", "--flip-decode-kv", "0.00001")),
        ):
            router.stop()
            router = start_router(log_dir, prefill, decode, "--flip-roles", "--flip-hold", "0.1", *limits)
            router.wait_whole()
            deadline = time.monotonic() + 120
            name = engine.url.removeprefix("http://")
            while not router.metric(f"{role}_requests_total", engine=name, outcome="ok"):
                assert time.monotonic() < deadline, f"{name} did not become a {role} engine:\n{router.tail()}"
                assert answers(router, asks, at_once=8) == plain_llama(asks)
            assert router.metric("tknp_role_flips_total", role=role) == 1
            assert not router.metric("tknp_requests_total", outcome="failed")
    finally:
        for service in (router, *decode, *prefill):
            service.stop()


def test_engines_that_do_not_fit_are_refused(models: Models, log_dir: Path) -> None:
    model = models("llama")
    prefill, decode = start_prefill(model, log_dir), start_decode(model, log_dir, 1, "--dtype", "bfloat16")
    router = start_router(log_dir, [prefill], [decode])
    try:
        for engine in (prefill, decode):
            engine.wait_ready()
        named = "don't fit: dtype is float32 and bfloat16"
        wait_for(lambda: named in requests.get(router.url + "/ready", timeout=10).text, 30, "the router noticing it")
        assert requests.get(router.url + "/ready", timeout=10).status_code == 503
        reply = router.post("/v1/completions", completion([5, 6, 7], 4).body)
        assert reply.status_code == 503
        assert named in reply.json()["error"]["message"]
    finally:
        for service in (router, decode, prefill):
            service.stop()
