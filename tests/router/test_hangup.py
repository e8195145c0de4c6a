"""A client that hangs up, in each phase of its request's life, cancels whichever leg runs."""

from __future__ import annotations

import socket
import struct
import time

import pytest

from tests.router.conftest import Stack, StartStack
from tests.router.running import RunningRouter, wait_for
from tests.router.scripted_engine import ScriptedEngine, answer_decode, chunk, raw_stream, stall

SECOND = 1.0  # within this the engine must know


def last_record(router: RunningRouter) -> dict[str, object]:
    wait_for(router.is_idle)
    ((_, record),) = router.state.records._finished.items()
    return record.as_dict()


def leave(raw: socket.socket, how: str) -> None:
    if how == "reset":  # as a client that crashed
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()


def assert_cancelled(engine: ScriptedEngine) -> None:
    begin = time.monotonic()
    assert engine.seen[0].cancelled.wait(10)
    assert time.monotonic() - begin < SECOND


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("stream", [False, True])
def test_during_prefill(stack: Stack, how: str, stream: bool) -> None:
    stack.prefill[0].behaviour = stall
    raw = stack.router.open_stream(stream=stream)
    wait_for(lambda: stack.prefill[0].seen)
    leave(raw, how)
    assert_cancelled(stack.prefill[0])
    record = last_record(stack.router)
    assert record["outcome"] == "cancelled"
    assert list(record["moments"]) == ["received", "prefill_sent", "cancelled"]  # type: ignore[call-overload]
    assert not stack.decode[0].seen


@pytest.mark.parametrize("stream", [False, True])
def test_before_the_first_token(stack: Stack, stream: bool) -> None:
    stack.decode[0].behaviour = stall
    raw = stack.router.open_stream(stream=stream)
    wait_for(lambda: stack.decode[0].seen)
    leave(raw, "close")
    assert_cancelled(stack.decode[0])
    assert last_record(stack.router)["outcome"] == "cancelled"
    assert stack.router.metric("decode_requests_total", engine=stack.decode[0].name, outcome="cancelled") == 1
    assert stack.router.metric("tknp_requests_total", endpoint="/v1/completions", outcome="cancelled") == 1


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("pause", [0.0, 0.01])
def test_in_mid_stream(stack: Stack, how: str, pause: float) -> None:
    stack.decode[0].behaviour = raw_stream(*(chunk(i) for i in range(3000)), pause=pause, then="stall")
    raw = stack.router.open_stream()
    got = b""
    while chunk(2) not in got:
        got += raw.recv(4096)
    leave(raw, how)
    assert_cancelled(stack.decode[0])
    assert last_record(stack.router)["outcome"] == "cancelled"


def test_while_the_body_is_sent(stack: Stack) -> None:
    with socket.create_connection(("127.0.0.1", stack.router.port)) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        wait_for(lambda: stack.router.state.records.in_flight())
    assert last_record(stack.router)["outcome"] == "cancelled"
    assert stack.num_seen == 0


def test_a_client_that_stops_reading_is_cut_off(start_stack: StartStack) -> None:
    stack = start_stack(between_chunks_timeout=1.0)
    stack.decode[0].behaviour = raw_stream(*([chunk(0) * 1000] * 3000), then="stall")
    raw = stack.router.open_stream()
    wait_for(lambda: stack.decode[0].seen)
    assert stack.decode[0].seen[0].cancelled.wait(20)
    record = last_record(stack.router)
    assert (record["outcome"], record["error"]) == ("cancelled", "The client stopped reading the stream.")
    raw.close()


def test_a_slow_client_slows_the_engine_and_nothing_piles_up(stack: Stack) -> None:
    """The router stops reading from the engine, instead of keeping what the client does not take."""
    num_sent = 0

    async def count(engine, request, seen):  # type: ignore[no-untyped-def]
        nonlocal num_sent
        from tests.router.scripted_engine import start_stream

        response = await start_stream(request)
        while num_sent < 10_000:
            await response.write(chunk(0) * 500)
            num_sent += 1
        return response

    stack.decode[0].behaviour = count
    raw = stack.router.open_stream()
    wait_for(lambda: num_sent > 10)
    stopped_at = -1
    while stopped_at != num_sent:
        stopped_at = num_sent
        time.sleep(0.5)
    assert num_sent < 1000  # about 20 MiB, all of it in sockets' buffers
    raw.close()
    assert_cancelled(stack.decode[0])


def test_others_go_on(stack: Stack) -> None:
    stack.decode[0].behaviour = stall
    raw = stack.router.open_stream()
    wait_for(lambda: stack.decode[0].seen)
    stack.decode[0].behaviour = answer_decode
    leave(raw, "close")
    assert stack.router.complete(stream=True).status == 200
    assert_cancelled(stack.decode[0])


def test_a_shutdown_tells_open_streams(start_stack: StartStack) -> None:
    stack = start_stack(shutdown_timeout=1.0)
    stack.decode[0].behaviour = raw_stream(chunk(0), then="stall")
    raw = stack.router.open_stream()
    got = b""
    while chunk(0) not in got:
        got += raw.recv(4096)
    stack.router.server.should_exit = True
    while part := raw.recv(4096):
        got += part
    assert b"router_shutting_down" in got
    assert b"[DONE]" not in got
    assert_cancelled(stack.decode[0])
    raw.close()
