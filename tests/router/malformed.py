"""Requests that go wrong in every way that one can on its way to a server; seeded, so that each can be made again."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from router.types import Api, Task
from tests.router.scripted_engine import MODEL


@dataclass(frozen=True)
class Case:
    """Bytes for one connection. With `hangs_up` the client closes it after them and waits for nothing.

    Without `must_answer` silence is right too: what was sent may be the beginning of something.
    """

    kind: str
    raw: bytes
    must_answer: bool = True
    hangs_up: bool = False


HELLO = [{"role": "user", "content": "hi"}]
BASES: dict[str, dict[str, Any]] = {
    Api.COMPLETIONS: {
        "prompt": [1, 2, 3],
        "max_tokens": 4,
        "stream": True,
        "stop": ["a"],
        "echo": False,
        "logprobs": 1,
    },
    Api.CHAT: {
        "messages": HELLO,
        "temperature": 0.5,
        "n": 2,
        "top_p": 0.9,
        "max_completion_tokens": 3,
        "top_logprobs": 1,
    },
    Api.RESPONSES: {"input": HELLO, "max_output_tokens": 16, "store": True, "truncation": "disabled", "tools": []},
    Task.TOKENIZE: {"prompt": "hi"},
    Task.DETOKENIZE: {"tokens": [1, 2]},
    Task.EMBEDDINGS: {"input": ["hi"], "encoding_format": "float"},
}
CHECKED = (
    *("model", "prompt", "messages", "input", "stream", "stream_options", "n", "temperature", "top_p", "seed", "stop"),
    *("presence_penalty", "frequency_penalty", "min_tokens", "prompt_logprobs", "truncate_prompt_tokens", "echo"),
    *("max_tokens", "max_completion_tokens", "max_output_tokens", "logprobs", "top_logprobs", "prompt_embeds"),
    *("best_of", "use_beam_search", "tools", "truncation", "store", "background", "previous_response_id"),
    *("conversation", "kv_transfer_params", "ec_transfer_params", "vllm_xargs", "priority", "user", "response_format"),
)
JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 2**64, 10**400, 0.5, -0.0, 1e308, float("nan")),
    *(float("inf"), "", "\x00", "1", "\ud800", "\U0001f600" * 50, "x" * 5000, "%n%s{}", "\u202e", [], {}, [[]], [{}]),
    *([None], [1, "a"], [[1], []], [True], {"": ""}, {"a": {"b": [{}]}}, [{"role": None}], [{"role": "user"}] * 3),
    *([0] * 3000, [[1, 2]] * 200, {"type": "function"}, [{"type": "web_search"}], {"kv_transfer_params": 1}),
)
TEXTS: tuple[bytes, ...] = (
    *(b"", b" ", b"{", b"}", b"null", b"true", b"0", b'""', b"[]", b"{}", b"[1,2", b"{'a':1}", b"{a:1}", b'{"a"}'),
    *(b"\x00", b"\xff\xfe", b"\xef\xbb\xbf{}", b"\x1f\x8b\x08\x00", b"NaN", b"-", b"1e", b"--boundary\r\n", b"a=1&b=2"),
    *(
        b'{"model":"tiny","prompt":"\\ud800"}',
        b'{"model":"tiny","prompt":"\\udc00\\ud800"}',
        b'{"model":"\xed\xa0\x80"}',
    ),
    *(
        b'{"model":"tiny","model":3,"prompt":"a"}',
        b'{"model":"tiny","prompt":"a"}{}',
        b'{"model":"tiny","prompt":"\xc3("}',
    ),
    *(
        b'{"model":"tiny","prompt":"\n"}',
        b'{"model":"tiny","prompt":"a",}',
        b'{"model":"tiny","n":1' + b"0" * 9000 + b"}",
    ),
    *(b'{"model":"tiny","n":-' + b"9" * 400 + b'.5e9,"prompt":"a"}', b'{"model":"tiny","prompt":"a","n":+1}'),
)
METHODS = (
    b"GET",
    b"HEAD",
    b"POST",
    b"PUT",
    b"PATCH",
    b"DELETE",
    b"OPTIONS",
    b"TRACE",
    b"CONNECT",
    b"get",
    b"BREW",
    b"\xff",
)
PATHS = (
    *(b"/", b"/v1", b"/v1/", b"//v1/models", b"/v1/models/", b"/v1/models/%", b"/v1/models/%ff%fe", b"/v1/models/%00"),
    *(
        b"/v1/models/a%2Fb",
        b"/v1/models/..%2f..%2fetc",
        b"/v1/models/../models",
        b"/v1/responses/%zz",
        b"/requests/%0d%0a",
    ),
    *(
        b"/requests/%F0%9F%98%80",
        b"/requests/",
        b"/v1/responses/a/b/c",
        b"/v1/completions?a=%&b=\xff",
        b"/v1/completions#x",
    ),
    *(
        b"*",
        b"http://example.com/v1/models",
        b"http://[::1",
        b"example.com:443",
        b"/\xc3\xa9",
        b"/" + b"a" * 9000,
        b"/health",
    ),
    *(
        b"/v1/models?" + b"x=1&" * 2000,
        b"/ready",
        b"/metrics",
        b"/openapi.json",
        b"/\x00",
        b"/a b",
        b"\\v1\\models",
        b"",
    ),
)
HEADERS = (
    *(b"X-Request-Id: \xff\xfe", b"X-Request-Id: a b", b"X-Request-Id:", b"X-Request-Id: " + b"a" * 500, b": no name"),
    *(b"no colon", b"A\x00B: c", b"A: \x00", b" Folded: a", b"Host", b"Host: a\r\nHost: b", b"Content-Type: nonsense"),
    *(
        b"Content-Type: text/plain; charset=utf-16",
        b"Content-Encoding: gzip",
        b"Accept: \xe2\x82\xac",
        b"Expect: 100-continue",
    ),
    *(b"Content-Length: -1", b"Content-Length: 1e3", b"Content-Length: 99999999999999999999", b"Content-Length: +5"),
    *(
        b"Transfer-Encoding: chunked",
        b"Transfer-Encoding: gzip",
        b"Transfer-Encoding: chunked, identity",
        b"Connection: \xff",
    ),
    *(
        b"Upgrade: websocket\r\nConnection: Upgrade",
        b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings",
        b"Te: trailers",
    ),
    *(
        b"traceparent: \xff",
        b"tracestate: a=b\r\ntracestate: c",
        b"Authorization: Bearer \xff\xff",
        b"Cookie: " + b"a" * 9000,
    ),
    *(b"Accept: text/plain;q=\xff", b"Range: bytes=9-1", b"If-None-Match: *", b"X: " + b"\t" * 200, b"\x7fX: 1"),
)
STARTS = (
    *(
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /health\r\n\r\n",
        b"\r\n" * 50,
    ),
    *(
        b"GET /health HTTP/0.9\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\n\n",
        b"GET  /health  HTTP/1.1\r\n\r\n",
    ),
    *(
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"GET /health HTTP/1.0\r\n\r\n",
        b"\x00" * 100,
        b"SSH-2.0-x\r\n",
        b"EHLO x\r\n",
        b"G",
        b"GET /health",
    ),
    *(
        b"GET /health HTTP/1.1\r\nHost: x\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
    ),
)


def cases(seed: int, count: int) -> Iterator[Case]:
    """`count` cases: mostly bodies, since there the router has most to say."""
    rng = random.Random(seed)
    kinds: dict[Callable[[random.Random], Case], int] = {
        mutated: 30,
        wrong_fields: 30,
        not_json: 8,
        deep: 4,
        wrong_head: 12,
        wrong_chunks: 6,
        wrong_length: 2,
        no_http: 3,
        hang_up: 5,
    }
    for make in rng.choices(list(kinds), list(kinds.values()), k=count):
        yield make(rng)


def post(path: str, body: bytes, *headers: bytes, length: int | None = None) -> bytes:
    size = b"%d" % (len(body) if length is None else length)
    lines = [b"POST %b HTTP/1.1" % path.encode(), b"Host: x", b"Content-Length: " + size, *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def base(rng: random.Random) -> tuple[str, dict[str, Any]]:
    path = rng.choice(list(BASES))
    return path, {"model": MODEL, **BASES[path]}


def mutated(rng: random.Random) -> Case:
    """A good body with bytes cut off, put in or taken out."""
    path, body = base(rng)
    raw = json.dumps(body).encode()
    for _ in range(rng.randrange(1, 4)):
        at, size = rng.randrange(1, len(raw)), rng.randrange(1, 9)
        raw = rng.choice(
            [raw[:at], raw[:at] + rng.randbytes(size) + raw[at:], raw[:at] + raw[at + size :], raw[at:] + raw]
        )
        if len(raw) < 2:
            break
    return Case("mutated", post(path, raw))


def wrong_fields(rng: random.Random) -> Case:
    path, body = base(rng)
    for _ in range(rng.randrange(1, 4)):
        body[rng.choice([*CHECKED, *body])] = rng.choice(JUNK)
    return Case("wrong_fields", post(path, json.dumps(body).encode()))


def not_json(rng: random.Random) -> Case:
    body = rng.choice(TEXTS) if rng.random() < 0.7 else rng.randbytes(rng.randrange(300))
    return Case("not_json", post(rng.choice(list(BASES)), body))


def deep(rng: random.Random) -> Case:
    path, body = base(rng)
    depth = rng.choice([100, 253, 254, 255, 1000, 50_000])
    opening, closing = rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
    field = rng.choice(CHECKED).encode()
    raw = json.dumps(body).encode()[:-1] + b',"%b":%b1%b}' % (
        field,
        opening * depth,
        closing * rng.choice([depth, depth - 1]),
    )
    return Case("deep", post(path, raw))


def wrong_head(rng: random.Random) -> Case:
    path, body = base(rng)
    headers = rng.sample(HEADERS, rng.randrange(0, 3))
    target = rng.choice(PATHS) if rng.random() < 0.7 else path.encode()
    method = rng.choice(METHODS)
    raw = json.dumps(body).encode() if method == b"POST" else b""
    lines = [method + b" " + target + b" HTTP/1.1", b"Host: x", *headers]
    if raw:
        lines.append(b"Content-Length: %d" % len(raw))
    # A header may announce a body that does not come, which ends in silence or in a 408.
    return Case("wrong_head", b"\r\n".join(lines) + b"\r\n\r\n" + raw, must_answer=False)


def wrong_chunks(rng: random.Random) -> Case:
    path, body = base(rng)
    raw = json.dumps(body).encode()
    at = rng.randrange(1, len(raw))
    size = rng.choice(
        [b"%x" % at, b"%X;ext=1" % at, b"-1", b"zz", b"0x5", b"ffffffffffffffffff", b"%x" % (at + 3), b"", b" 5"]
    )
    end = rng.choice([b"0\r\n\r\n", b"0\r\nTrailer: x\r\n\r\n", b"", b"0\r\n", b"00000\r\n\r\n", b"0\n\n", b"junk"])
    head = b"POST %b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" % path.encode()
    chunks = size + b"\r\n" + raw[:at] + b"\r\n" + b"%x\r\n%b\r\n" % (len(raw) - at, raw[at:]) + end
    return Case("wrong_chunks", head + chunks, must_answer=False)


def wrong_length(rng: random.Random) -> Case:
    path, body = base(rng)
    raw = json.dumps(body).encode()
    length = rng.choice([len(raw) + rng.randrange(1, 50), rng.randrange(len(raw)), 2**40])
    return Case("wrong_length", post(path, raw, length=length))


def no_http(rng: random.Random) -> Case:
    raw = rng.choice(STARTS) if rng.random() < 0.7 else rng.randbytes(rng.randrange(1, 400))
    return Case("no_http", raw, must_answer=False)


def hang_up(rng: random.Random) -> Case:
    """Half a request, or a whole one, and nobody there for the answer."""
    path, body = base(rng)
    raw = post(path, json.dumps(body).encode())
    return Case("hang_up", raw[: rng.randrange(1, len(raw) + 1)], must_answer=False, hangs_up=True)
