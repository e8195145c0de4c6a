"""Metrics, records and the log line of a request, all from the same moments."""

from __future__ import annotations

import logging

import pytest

from router.lifetime import Moment
from tests.router.conftest import Stack, StartStack
from tests.router.running import wait_for
from tests.router.scripted_engine import NUM_CHUNKS, chunk, raw_stream, stall, status

ALL = ["received", "prefill_sent", "prefill_done", "decode_sent", "first_token", "last_token"]


def test_the_moments_of_a_stream(stack: Stack) -> None:
    answer = stack.router.complete(stream=True)
    wait_for(lambda: stack.router.record(answer)["kv_transfer"])
    record = stack.router.record(answer)
    moments = record["moments"]
    assert set(moments) == {*ALL, "transfer_begin", "transfer_end"}
    times = [moments[name] for name in ALL]
    assert times == sorted(times)
    assert record["kv_transfer"] == {"rank": 1, "kv_bytes": 4096, "num_transfers": 1, "hidden_bytes": 1024}
    assert record["phases"]["transfer"] == pytest.approx(0.25, abs=0.01)
    assert record["outcome"] == "ok"
    assert record["status"] == 200
    assert [attempt["outcome"] for attempt in record["attempts"]] == ["ok", "ok"]
    assert 1 <= record["num_chunks"] <= NUM_CHUNKS + 1


def test_an_answer_in_one_piece_has_no_first_token(stack: Stack) -> None:
    moments = stack.router.record(stack.router.complete())["moments"]
    assert Moment.FIRST_TOKEN not in moments
    assert Moment.LAST_TOKEN in moments


def test_what_is_counted(stack: Stack) -> None:
    router = stack.router
    stack.decode[0].behaviour = raw_stream(*(chunk(i) for i in range(3)), b"data: [DONE]\n\n", then="end", pause=0.05)
    router.complete(stream=True)
    assert router.metric("prefill_requests_total", engine=stack.prefill[0].name, outcome="ok") == 1
    assert router.metric("decode_requests_total", engine=stack.decode[0].name, outcome="ok") == 1
    assert router.metric("tknp_requests_total", endpoint="/v1/completions", outcome="ok") == 1
    assert router.metric("tknp_time_to_first_token_seconds_count") == 1
    assert router.metric("tknp_inter_token_latency_seconds_count") == 3
    for phase in ("route", "prefill", "handoff", "first_token", "decode", "total"):
        assert router.metric("tknp_request_phase_seconds_count", phase=phase) == 1, phase
    router.complete(max_tokens=-1)
    assert router.metric("tknp_requests_total", endpoint="/v1/completions", outcome="invalid") == 1
    stack.prefill[0].behaviour = status(400)
    router.chat()
    assert router.metric("tknp_requests_total", endpoint="/v1/chat/completions", outcome="rejected") == 1
    assert router.metric("prefill_requests_total", engine=stack.prefill[0].name, outcome="rejected") == 1


def test_transferred_bytes_are_counted(stack: Stack) -> None:
    stack.router.complete()
    wait_for(lambda: stack.router.metric("tknp_router_kv_transfer_bytes_total") == 4096)
    assert stack.router.metric("tknp_request_phase_seconds_count", phase="transfer") == 1


def test_transfers_are_not_asked_for_when_switched_off(start_stack: StartStack) -> None:
    stack = start_stack(record_transfers=False)
    answer = stack.router.complete()
    assert stack.router.record(answer)["kv_transfer"] is None
    assert stack.router.metric("tknp_router_kv_transfer_bytes_total") == 0


def test_local_prefill_is_counted_with_its_reason(stack: Stack) -> None:
    answer = stack.router.complete(prompt=["one", "two"])
    assert answer.status == 200
    assert not stack.prefill[0].seen
    assert "kv_transfer_params" not in stack.decode[0].seen[0].body
    assert stack.router.metric("tknp_local_prefill_requests_total", reason="several_prompts") == 1
    assert stack.router.record(answer)["local_prefill"] == "several_prompts"
    stack.prefill[0].behaviour = status(200, b'{"kv_transfer_params": null}')
    assert stack.router.complete().status == 200
    assert stack.router.metric("tknp_local_prefill_requests_total", reason="no_kv") == 1


def test_gauges_show_what_is_in_flight(stack: Stack) -> None:
    stack.decode[0].behaviour = stall
    raw = stack.router.open_stream()
    wait_for(lambda: stack.router.metric("tknp_requests_in_flight", phase="first_token") == 1)
    name = stack.decode[0].name
    assert stack.router.metric("tknp_engine_outstanding_requests", role="decode", engine=name) == 1
    raw.close()
    wait_for(lambda: stack.router.metric("tknp_requests_in_flight", phase="first_token") == 0)
    assert stack.router.metric("tknp_engine_outstanding_requests", role="decode", engine=name) == 0


def test_metrics_are_served_as_prometheus_text(stack: Stack) -> None:
    stack.router.complete()
    answer = stack.router.call("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    text = answer.body.decode()
    for name in ("prefill_requests_total", "decode_requests_total", "tknp_engine_up", "process_cpu_seconds_total"):
        assert f"\n{name}" in text
    families = {line.split()[2] for line in text.splitlines() if line.startswith("# HELP")}
    allowed = ("tknp_", "process_", "prefill_requests", "decode_requests")
    assert all(family.startswith(allowed) for family in families)


def test_one_log_line_for_each_request(stack: Stack, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "router.requests"):
        ids = [stack.router.complete(max_tokens=n).headers["x-request-id"] for n in (5, -1)]
        wait_for(lambda: len(caplog.records) == 2)
    lines = {line.fields["request_id"]: line.fields for line in caplog.records}  # type: ignore[attr-defined]
    assert [lines[i]["outcome"] for i in ids] == ["ok", "invalid"]
    assert lines[ids[0]]["kv_transfer"]["rank"] == 1
    assert "max_tokens" in lines[ids[1]]["error"]


def test_records_are_bounded(start_stack: StartStack) -> None:
    stack = start_stack(num_request_records=3)
    answers = [stack.router.complete() for _ in range(5)]
    found = [stack.router.call("GET", f"/requests/{a.headers['x-request-id']}").status for a in answers]
    assert found == [404, 404, 200, 200, 200]


def test_an_id_in_flight_is_not_given_twice(stack: Stack) -> None:
    stack.prefill[0].behaviour = stall
    raw = stack.router.open_stream()
    wait_for(lambda: stack.prefill[0].seen)
    (taken,) = [record.id for record in stack.router.state.records.in_flight()]
    answer = stack.router.complete({"X-Request-Id": taken}, max_tokens=-1)
    assert answer.headers["x-request-id"] != taken
    raw.close()
