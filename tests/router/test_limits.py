"""Bodies and headers over their limits, whatever they say of themselves."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import orjson
import pytest

from tests.router.conftest import Stack, StartStack

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
            assert raw.recv(65_536).startswith(b"HTTP/1.1 200")


def test_content_type_does_not_matter(start_stack: StartStack) -> None:
    stack = start_stack()
    raw = orjson.dumps({"model": "tiny", "prompt": "hi"})
    assert stack.router.call("POST", "/v1/completions", raw, {"Content-Type": "text/plain"}).status == 200
    assert stack.decode[0].seen[0].headers["content-type"] == "application/json"


def test_a_compressed_body_is_named_as_such(small: Stack) -> None:
    headers = HEAD + b"Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\n"
    status, error = exchange(small, headers + b"\x1f\x8b\x08")
    assert (status, error["code"]) == (415, "unsupported_content_encoding")
    assert "gzip" in error["message"]
