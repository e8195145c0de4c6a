"""Bodies and headers over their limits, whatever they say of themselves."""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Iterator

import orjson
import pytest

from router.protocol import NUM_SPARE
from tests.router.conftest import Stack, StartStack
from tests.router.running import wait_for
from tests.router.scripted_engine import slow

LIMIT = 4096
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture
def small(start_stack: StartStack) -> Iterator[Stack]:
    found = start_stack(max_body_bytes=LIMIT, max_header_bytes=LIMIT, body_timeout=2.0)
    yield found
    assert found.num_seen == 0


def exchange(stack: Stack, *parts: bytes) -> tuple[int, dict[str, str]]:
    """Sends the parts as they are; returns the status and the error of the answer."""
    with socket.create_connection(("127.0.0.1", stack.router.port), timeout=30) as raw:
        try:
            for part in parts:
                raw.sendall(part)
        except ConnectionError:
            pass  # refused before all of it was sent
        got = b""
        while b"\r\n\r\n" not in got or not got.endswith(b"}"):
            part = raw.recv(65_536)
            if not part:
                break
            got += part
    head, _, body = got.partition(b"\r\n\r\n")
    return int(head.split()[1]), orjson.loads(body)["error"]


def test_a_body_that_says_it_is_too_long_is_not_read(small: Stack) -> None:
    status, error = exchange(small, HEAD + b"Content-Length: 99999999999\r\n\r\n{")
    assert (status, error["code"]) == (413, "request_too_large")
    assert "99999999999" in error["message"]
    assert str(LIMIT) in error["message"]


def test_a_body_without_a_length_is_read_to_the_limit(small: Stack) -> None:
    chunks = [b"400\r\n" + b"x" * 1024 + b"\r\n"] * 6
    status, error = exchange(small, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *chunks)
    assert (status, error["code"]) == (413, "request_too_large")


def test_a_body_longer_than_it_says_is_cut_there(small: Stack) -> None:
    status, error = exchange(small, HEAD + b"Content-Length: 10\r\n\r\n" + b"x" * 100)
    assert (status, error["code"]) == (400, "invalid_value")


def test_a_body_that_never_ends_times_out(small: Stack) -> None:
    status, error = exchange(small, HEAD + b"Content-Length: 100\r\n\r\n{")
    assert (status, error["code"]) == (408, "request_timeout")


def test_whole_headers_over_the_limit(small: Stack) -> None:
    status, error = exchange(small, HEAD + b"X-Long: " + b"a" * LIMIT + b"\r\nContent-Length: 2\r\n\r\n{}")
    assert (status, error["code"]) == (431, "headers_too_large")


def test_headers_that_never_end(small: Stack) -> None:
    status, error = exchange(small, HEAD + b"X-Long: ", *[b"a" * 1024] * 64)
    assert (status, error["code"]) == (431, "headers_too_large")


def test_a_body_at_the_limit_passes(start_stack: StartStack) -> None:
    stack = start_stack(max_body_bytes=LIMIT)
    raw = orjson.dumps({"model": "tiny", "prompt": "hi"}).ljust(LIMIT)
    assert stack.router.call("POST", "/v1/completions", raw).status == 200
    assert stack.router.call("POST", "/v1/completions", raw + b" ").status == 413


def test_a_connection_is_used_again_after_a_large_body(start_stack: StartStack) -> None:
    """What is counted for the headers of one request is not counted for the next."""
    stack = start_stack(max_header_bytes=1024)
    body = orjson.dumps({"model": "tiny", "prompt": "x" * 100_000})
    request = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with socket.create_connection(("127.0.0.1", stack.router.port), timeout=30) as raw:
        for _ in range(3):
            raw.sendall(request)
            response = http.client.HTTPResponse(raw)
            response.begin()
            assert (response.status, response.read()[:1]) == (200, b"{")


def test_a_body_that_never_ends_times_out_after_one_that_came_with_its_headers(start_stack: StartStack) -> None:
    """On the same connection, and even if it was sent before the first one's answer."""
    stack = start_stack(body_timeout=0.5)
    body = orjson.dumps({"model": "tiny", "prompt": "x"})
    whole = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with socket.create_connection(("127.0.0.1", stack.router.port), timeout=30) as raw:
        raw.sendall(whole + HEAD + b"Content-Length: %d\r\n\r\n{" % len(body))
        statuses = []
        for _ in range(2):
            response = http.client.HTTPResponse(raw)
            response.begin()
            statuses.append(response.status)
            response.read()
    assert statuses == [200, 408]


def test_content_type_does_not_matter(start_stack: StartStack) -> None:
    stack = start_stack()
    raw = orjson.dumps({"model": "tiny", "prompt": "hi"})
    assert stack.router.call("POST", "/v1/completions", raw, {"Content-Type": "text/plain"}).status == 200
    assert stack.decode[0].seen[0].headers["content-type"] == "application/json"


def connect(stack: Stack, count: int) -> list[socket.socket]:
    return [socket.create_connection(("127.0.0.1", stack.router.port), timeout=30) for _ in range(count)]


def num_connections(stack: Stack) -> int:
    return len(stack.router.server.server_state.connections)


def test_too_many_connections(start_stack: StartStack) -> None:
    """A request on one too many is refused; a probe is not, or the router would be killed for being busy."""
    stack = start_stack(max_connections=5)
    idle = connect(stack, 5)
    wait_for(lambda: num_connections(stack) == 5)
    answer = stack.router.complete()
    assert (answer.status, answer.error["code"]) == (503, "too_many_connections")
    assert (answer.headers["connection"], answer.headers["retry-after"]) == ("close", "5")
    assert stack.router.metric("tknp_refused_connections_total") == 1
    assert stack.num_seen == 0
    assert stack.router.call("GET", "/health").status == stack.router.call("GET", "/ready").status == 200
    idle.pop().close()
    wait_for(lambda: stack.router.complete().status == 200)
    for one in idle:
        one.close()


def test_far_too_many_connections_are_closed_unheard(start_stack: StartStack) -> None:
    stack = start_stack(max_connections=1)
    idle = connect(stack, 1 + NUM_SPARE)
    wait_for(lambda: num_connections(stack) == 1 + NUM_SPARE)
    status, error = exchange(stack)
    assert (status, error["code"]) == (503, "too_many_connections")
    for one in idle:
        one.close()
    wait_for(lambda: stack.router.complete().status == 200)


PROBE = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    ("first", "part"), [(b"", b""), (b"", b"POST /v1/comp"), (b"", HEAD + b"X-Long: "), (PROBE, b"POST /v1/comp")]
)
def test_a_connection_does_not_wait_for_headers_for_ever(start_stack: StartStack, first: bytes, part: bytes) -> None:
    stack = start_stack(header_timeout=0.5)
    with socket.create_connection(("127.0.0.1", stack.router.port), timeout=30) as raw:
        if first:
            raw.sendall(first)
            assert raw.recv(65_536).startswith(b"HTTP/1.1 200")
        begin = time.monotonic()
        raw.sendall(part)
        got = raw.recv(65_536)
        assert 0.4 < time.monotonic() - begin < 5
        assert got.startswith(b"HTTP/1.1 408" if part else b"")
        assert not part or orjson.loads(got.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
        assert not raw.recv(65_536)
    assert stack.num_seen == 0


def test_a_long_answer_is_not_cut_by_the_limit_on_headers(start_stack: StartStack) -> None:
    stack = start_stack(header_timeout=0.3)
    stack.decode[0].behaviour = slow(0.8)
    assert stack.router.complete().status == 200


def test_a_compressed_body_is_named_as_such(small: Stack) -> None:
    headers = HEAD + b"Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\n"
    status, error = exchange(small, headers + b"\x1f\x8b\x08")
    assert (status, error["code"]) == (415, "unsupported_content_encoding")
    assert "gzip" in error["message"]
