"""What can be seen of real engines from outside: traces that reach through them, the guard, live page, dashboards."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.deploy.prometheus import MISSING, find_program
from tests.e2e.panel_data import blind_autoscalers, broken_rules, lacking, undocumented
from tests.e2e.processes import ENGINE_OPTIONS, Service, start_router, tknp, wait_for
from tests.e2e.stack import Stack, running
from tests.e2e.suite import Ask, completion, conversations, tokens
from tests.e2e.watched import watched
from tests.router.collector import Collector, grpc_collector
from tknp.common.ports import free_port
from tknp.tiny_model import make_tiny_model

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
WAIT = 30.0  # s; vLLM exports every 5 s


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with grpc_collector() as found:
        yield found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders with a model of one name and shape, but other weights: no check of engines tells them apart."""
    found = tmp_path_factory.mktemp("right"), tmp_path_factory.mktemp("wrong")
    for seed, folder in enumerate(found):
        make_tiny_model(folder / "model", seed=seed)
    return found


def start(kind: str, folder: Path, log_dir: Path, name: str, *options: str) -> Service:
    port = free_port()
    command = tknp(kind, "./model", "--port", str(port), *ENGINE_OPTIONS, *options)
    return Service(name, ["env", f"--chdir={folder}", *command], log_dir, port)


@pytest.fixture(scope="module")
def wrong_prefill(folders: tuple[Path, Path], log_dir: Path) -> Iterator[Service]:
    engine = start("prefill", folders[1], log_dir, "wrong-prefill")
    try:
        yield engine
    finally:
        engine.stop()


@pytest.fixture(scope="module")
def stack(folders: tuple[Path, Path], log_dir: Path, collector: Collector, wrong_prefill: Service) -> Iterator[Stack]:
    traces = f"--otlp-traces-endpoint={collector.url}"
    prefill = start("prefill", folders[0], log_dir, "prefill", traces)
    decode = start("decode", folders[0], log_dir, "decode", "--token-parallel-size=2", traces)
    with running(prefill, decode, log_dir, traces, "--guard-share=1", "--trace-sample-ratio=0") as stack:
        yield stack


def greedy(num_prompt_tokens: int, seed: int) -> Ask:
    return completion(tokens(num_prompt_tokens, seed), 12)


def test_the_spans_of_both_engines_join_the_clients_trace(stack: Stack, collector: Collector) -> None:
    ask = greedy(100, 1)
    headers = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01", "X-Request-Id": "traced"}
    assert stack.router.post(ask.path, ask.body, headers=headers).status_code == 200
    unsampled = {"traceparent": f"00-{'1' * 32}-{'2' * 16}-00"}
    assert stack.router.post(ask.path, ask.body, headers=unsampled).status_code == 200

    def ours() -> dict[str, str]:
        return {span.span_id.hex(): span.name for span in collector.spans() if span.trace_id.hex() == TRACE_ID}

    def engines() -> list[tuple[str, str]]:
        """The router's leg above each of vLLM's spans, and its name."""
        spans = [span for span in collector.spans() if span.trace_id.hex() == TRACE_ID and span.name == "llm_request"]
        return sorted((ours().get(span.parent_span_id.hex(), "none"), span.name) for span in spans)

    wait_for(lambda: len(engines()) >= 2, WAIT, "both engines' spans")
    (decode, _), (prefill, _) = engines()
    assert decode == f"decode 127.0.0.1:{stack.decode.port}"
    assert prefill == f"prefill 127.0.0.1:{stack.prefill.port}"
    assert {"POST /v1/completions", "route", "handoff", "transfer", "answer"} <= set(ours().values())
    assert not [span for span in collector.spans() if span.trace_id.hex() == "1" * 32], "the client said: not sampled"


def test_the_guard_finds_real_answers_equal(stack: Stack) -> None:
    before = stack.router.metric("tknp_guard_requests_total", result="equal")
    asks = [*(greedy(length, length) for length in (1, 33, 150)), *conversations()]
    for ask in asks:
        for stream in (False, True):
            body = {name: value for name, value in ask.body.items() if name != "return_token_ids"}
            assert stack.router.post(ask.path, {**body, "stream": stream}).status_code == 200

    def done() -> bool:
        return stack.router.metric("tknp_guard_requests_total") - before >= 2 * len(asks)

    wait_for(done, WAIT, "the guard's verdicts")
    for result in ("different", "failed", "skipped"):
        assert stack.router.metric("tknp_guard_requests_total", result=result) == 0, result
    stack.wait_idle()


def test_the_guard_finds_kv_of_other_weights(stack: Stack, wrong_prefill: Service, tmp_path: Path) -> None:
    wrong_prefill.wait_ready()
    router = start_router(tmp_path, [wrong_prefill], [stack.decode], "--guard-share=1")
    try:
        router.wait_whole()
        for seed in range(8):
            ask = greedy(200, 500 + seed)
            assert router.post(ask.path, {**ask.body, "return_token_ids": False}).status_code == 200
        wait_for(lambda: router.metric("tknp_guard_requests_total") == 8, WAIT, "the guard's verdicts")
        assert router.metric("tknp_guard_requests_total", result="equal") <= 1, "one may be right by chance"
        # The small model writes parts of characters too, of which the guard won't say that they are wrong.
        assert router.metric("tknp_guard_requests_total", result="different") >= 3
        assert "two answers to one greedy request part" in router.tail()
        shown = router.get("/status")["guard"]
        assert shown["counts"]["different"] >= 3
    finally:
        router.stop()
    stack.wait_idle()


def test_the_live_page_shows_the_ranks(stack: Stack) -> None:
    assert requests.get(stack.router.url, timeout=30).headers["Content-Type"].startswith("text/html")
    stack.router.get("/status")
    prefill, decode = stack.router.get("/status")["engines"]
    assert [rank["rank"] for rank in decode["ranks"]] == [0, 1]
    assert all(rank["kv_used"] == 0 for rank in decode["ranks"])
    assert prefill["kv_used"] == 0


def test_every_panel_of_the_dashboards_has_data(stack: Stack, tmp_path: Path) -> None:
    """And so has every query that the chart's autoscalers ask; every rule can be evaluated, of metrics that exist; and
    every metric of ours is documented."""
    if find_program("prometheus") is None:
        pytest.skip(MISSING.format("prometheus"))
    with watched(stack.prefill, stack.decode, tmp_path) as prometheus:
        deadline = time.monotonic() + 90
        while (lacks := lacking(prometheus)) and time.monotonic() < deadline:
            time.sleep(2)
        assert lacks == []
        assert broken_rules(prometheus) == []
        assert blind_autoscalers(prometheus) == []
        assert undocumented(prometheus) == []
    stack.wait_idle()
