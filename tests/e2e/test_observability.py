"""What can be seen of real engines from outside: traces that reach through them, the guard's verdicts, the live page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from tests.e2e.processes import start_decode, start_prefill, wait_for
from tests.e2e.stack import Stack, running
from tests.e2e.suite import Ask, completion, conversations, tokens
from tests.router.collector import Collector, grpc_collector

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
WAIT = 30.0  # s; vLLM exports every 5 s


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with grpc_collector() as found:
        yield found


@pytest.fixture(scope="module")
def stack(models: Callable[[str], Path], log_dir: Path, collector: Collector) -> Iterator[Stack]:
    model, traces = models("llama"), f"--otlp-traces-endpoint={collector.url}"
    prefill, decode = start_prefill(model, log_dir, traces), start_decode(model, log_dir, 2, traces)
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


def test_the_live_page_shows_the_ranks(stack: Stack) -> None:
    assert requests.get(stack.router.url, timeout=30).headers["Content-Type"].startswith("text/html")
    stack.router.get("/status")
    prefill, decode = stack.router.get("/status")["engines"]
    assert [rank["rank"] for rank in decode["ranks"]] == [0, 1]
    assert all(rank["kv_used"] == 0 for rank in decode["ranks"])
    assert prefill["kv_used"] == 0
