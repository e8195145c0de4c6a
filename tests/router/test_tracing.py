"""Spans, as an OpenTelemetry collector receives them from the router."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from router.lifetime import Attempt, Moment, RequestRecord, Transfer
from router.trace_context import MAX_SPAN_ID, TraceContext
from router.types import Api, Endpoint, Outcome, Role
from tests.router.collector import Collector, attributes, grpc_collector, http_collector
from tests.router.conftest import Stack, StartStack
from tests.router.running import wait_for
from tests.router.scripted_engine import hang_up, status

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-{flags}"
ERROR = 2  # opentelemetry.proto.trace.v1.Status.STATUS_CODE_ERROR


@pytest.fixture
def collector() -> Iterator[Collector]:
    with grpc_collector() as found:
        yield found


def traced(start_stack: StartStack, collector: Collector, **settings: Any) -> Stack:
    return start_stack(**{"otlp_traces_endpoint": collector.url, "trace_sample_ratio": 1.0, **settings})


def wait_for_request(collector: Collector) -> Any:
    """The router's own span; all of a request's are exported together, this one first."""
    wait_for(lambda: any(span.name.startswith("POST") for span in collector.spans()))
    return collector.named("POST")


def parent_of(headers: dict[str, str]) -> tuple[str, str, str]:
    """Trace id, span id and flags of what an engine got."""
    version, trace_id, span_id, flags = headers["traceparent"].split("-")
    assert version == "00"
    return trace_id, span_id, flags


def test_one_span_for_the_request_and_one_for_each_leg_and_phase(start_stack: StartStack, collector: Collector) -> None:
    stack = traced(start_stack, collector)
    answer = stack.router.complete({"traceparent": PARENT.format(flags="01"), "tracestate": "a=1"}, stream=True)
    root = wait_for_request(collector)
    assert root.name == "POST /v1/completions"
    assert root.trace_id.hex() == "0af7651916cd43dd8448eb211c80319c"
    assert root.parent_span_id.hex() == "b7ad6b7169203331"
    found = attributes(root)
    assert found["tknp.request_id"] == answer.headers["x-request-id"]
    assert found["http.response.status_code"] == 200
    prefill, decode = collector.named("prefill"), collector.named("decode 127")
    for leg, engine in ((prefill, stack.prefill[0]), (decode, stack.decode[0])):
        assert leg.parent_span_id == root.span_id
        headers = engine.seen[0].headers
        assert parent_of(headers) == (root.trace_id.hex(), leg.span_id.hex(), "01")
        assert headers["tracestate"] == "a=1"
        assert attributes(leg)["server.address"] == engine.name
    parents = {span.name: span.parent_span_id for span in collector.spans() if span not in (root, prefill, decode)}
    assert parents == {
        **dict.fromkeys(("route", "handoff"), root.span_id),
        **dict.fromkeys(("transfer", "first_token", "decode"), decode.span_id),
    }
    assert attributes(collector.named("transfer")) == {"tknp.rank": 1, "tknp.kv_bytes": 4096}
    assert all(span.trace_id == root.trace_id for span in collector.spans())
    inside = [span for span in collector.spans() if span.name != "transfer"]  # that one is by the engine's clock
    assert all(root.start_time_unix_nano <= s.start_time_unix_nano <= s.end_time_unix_nano for s in inside)
    assert len({span.span_id for span in collector.spans()}) == len(collector.spans())


def test_over_http_too(start_stack: StartStack) -> None:
    with http_collector() as collector:
        stack = traced(start_stack, collector, otlp_traces_protocol="http/protobuf")
        stack.router.complete()
        root = wait_for_request(collector)
        assert not root.parent_span_id
        assert collector.named("answer").parent_span_id == collector.named("decode").span_id


def test_the_client_decides_whether_to_sample(start_stack: StartStack, collector: Collector) -> None:
    stack = traced(start_stack, collector)
    stack.router.complete({"traceparent": PARENT.format(flags="00")})
    assert parent_of(stack.decode[0].seen[0].headers)[2] == "00"
    stack.router.complete({"traceparent": PARENT.format(flags="01")}, max_tokens=7)
    wait_for_request(collector)
    assert parent_of(stack.decode[0].seen[1].headers)[2] == "01"
    assert len([span for span in collector.spans() if span.name.startswith("POST")]) == 1


def test_without_the_clients_decision_the_ratio_decides(start_stack: StartStack, collector: Collector) -> None:
    stack = traced(start_stack, collector, trace_sample_ratio=0)
    stack.router.complete()
    assert parent_of(stack.decode[0].seen[0].headers)[2] == "00"


@pytest.mark.parametrize("bad", ["", "00-0-0-01", PARENT.format(flags="01").upper() + "-x", "ff" + PARENT[2:]])
def test_a_broken_traceparent_begins_a_new_trace(start_stack: StartStack, collector: Collector, bad: str) -> None:
    stack = traced(start_stack, collector)
    stack.router.complete({"traceparent": bad})
    root = wait_for_request(collector)
    assert not root.parent_span_id
    assert root.trace_id.hex() == parent_of(stack.prefill[0].seen[0].headers)[0]


def test_a_failed_attempt_keeps_its_span(start_stack: StartStack, collector: Collector) -> None:
    stack = traced(start_stack, collector, num_decode=2)
    stack.decode[0].behaviour = hang_up
    for _ in range(2):  # the policy may take the good one first
        stack.router.complete({"traceparent": PARENT.format(flags="01")})
    name = f"decode {stack.decode[0].name}"
    wait_for(lambda: any(span.name == name for span in collector.spans()))
    failed = next(span for span in collector.spans() if span.name == name)
    assert failed.status.code == ERROR
    assert attributes(failed)["tknp.outcome"] == "failed"
    assert failed.span_id.hex() in [parent_of(seen.headers)[1] for seen in stack.decode[0].seen]


def test_a_failed_request_says_why_without_the_clients_text(start_stack: StartStack, collector: Collector) -> None:
    stack = traced(start_stack, collector)
    stack.prefill[0].behaviour = status(400, b'{"error":{"message":"what about: my secret prompt"}}')
    stack.router.complete()
    root = wait_for_request(collector)
    assert root.status.code == ERROR
    assert root.status.message == "The engine refused the request with status 400."


def test_what_is_left_is_sent_at_the_end(start_stack: StartStack, collector: Collector) -> None:
    stack = traced(start_stack, collector, record_transfers=False)
    stack.router.complete()
    stack.router.server.should_exit = True
    wait_for_request(collector)


def test_without_a_collector_the_clients_headers_pass_through(stack: Stack) -> None:
    stack.router.complete({"traceparent": PARENT.format(flags="01"), "tracestate": "a=1"})
    for engine in (stack.prefill[0], stack.decode[0]):
        assert engine.seen[0].headers["traceparent"] == PARENT.format(flags="01")
        assert engine.seen[0].headers["tracestate"] == "a=1"
    stack.router.complete()
    assert "traceparent" not in stack.decode[0].seen[1].headers


def test_each_leg_has_an_id_of_its_own() -> None:
    trace = TraceContext(1, MAX_SPAN_ID, None, True)
    parents = [dict(trace.leg_headers(index))["traceparent"] for index in range(40)]
    assert len(set(parents)) == 40
    assert {len(parent) for parent in parents} == {55}


def test_a_collector_that_is_gone_costs_no_request(start_stack: StartStack) -> None:
    stack = start_stack(otlp_traces_endpoint="http://127.0.0.1:9")
    assert stack.router.complete().status == 200


def test_a_record_with_every_moment_has_a_span_for_each_phase() -> None:
    record = RequestRecord("a", Api.CHAT, outcome=Outcome.OK)
    record.attempts.append(Attempt(Endpoint(Role.DECODE, "http://a:1"), Outcome.OK))
    for moment in (Moment.DECODE_SENT, Moment.LAST_TOKEN):
        record.mark(moment)
    record.mark_transfer(Transfer(0, 1, 1), 1.0, 2.0)
    assert {phase.value for phase in record.phases()} == {"route", "answer", "transfer", "total"}
