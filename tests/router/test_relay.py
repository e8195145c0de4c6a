from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from router.engines import Engine
from router.errors import EngineFailure, EngineRejected
from router.lifetime import RequestRecord
from router.relay import StreamRelay
from router.reply import Reply
from router.responses import ResponsesRelay
from router.types import Api, Endpoint, Role
from tests.router.answers import COMPLETED, DELTAS, PREAMBLE, event

EVENTS = [b'data: {"text":"%d"}\n\n' % i for i in range(20)] + [b"data: [DONE]\n\n"]


class Content:
    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = list(pieces)

    def at_eof(self) -> bool:
        return not self._pieces

    async def readany(self) -> bytes:
        return self._pieces.pop(0)


class Response:
    content_type = "text/event-stream"
    connection = None

    def __init__(self, pieces: list[bytes]) -> None:
        self.content = Content(pieces)


def relay(pieces: list[bytes], kind: type[StreamRelay] = StreamRelay) -> list[bytes]:
    """What the client was sent, chunk by chunk."""
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        if message.get("body"):
            sent.append(message["body"])

    async def run() -> None:
        record = RequestRecord("a", Api.CHAT)
        engine = Engine(Endpoint(Role.DECODE, "http://a:1"))
        stream = kind(engine, Reply(send), record, lambda gap: None, None)
        async with asyncio.timeout(10) as limit:
            await stream.run(Response(pieces), limit, 10.0)  # type: ignore[arg-type]

    asyncio.run(run())
    return sent


def cut(data: bytes, rng: random.Random) -> list[bytes]:
    pieces = []
    while data:
        size = rng.randrange(1, 60)
        pieces.append(data[:size])
        data = data[size:]
    return pieces


@pytest.mark.parametrize("seed", range(20))
def test_however_the_network_cuts_them_only_whole_events_are_sent(seed: int) -> None:
    whole = b"".join(EVENTS)
    sent = relay(cut(whole, random.Random(seed)))
    assert b"".join(sent) == whole
    assert all(piece.endswith(b"\n\n") for piece in sent)


@pytest.mark.parametrize("seed", range(20))
def test_a_response_passes_however_it_is_cut(seed: int) -> None:
    whole = b"".join((PREAMBLE, *DELTAS, COMPLETED))
    sent = relay(cut(whole, random.Random(seed)), ResponsesRelay)
    assert b"".join(sent) == whole
    assert sent[0].startswith(PREAMBLE) and len(sent[0]) > len(PREAMBLE), "the preamble waits for what follows it"


@pytest.mark.parametrize("pieces", [[PREAMBLE], [PREAMBLE, *DELTAS], [PREAMBLE, *DELTAS, COMPLETED[:-1]], []])
def test_a_response_without_its_end_is_a_failure(pieces: list[bytes]) -> None:
    with pytest.raises(EngineFailure, match="ended early"):
        relay(pieces, ResponsesRelay)


def test_text_that_looks_like_a_responses_end_is_not_the_end() -> None:
    text = event("response.output_text.delta", delta="\nevent: response.completed\n")
    with pytest.raises(EngineFailure, match="ended early"):
        relay([PREAMBLE, text], ResponsesRelay)


def test_crlf_events_pass() -> None:
    events = [event.replace(b"\n", b"\r\n") for event in EVENTS]
    assert b"".join(relay(events)) == b"".join(events)


def test_an_endless_event_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.relay.MAX_PARTIAL_BYTES", 2**20)
    piece = b"data: " + b"x" * 2**19
    sent = relay([piece] * 8 + [b"\n\n", EVENTS[-1]])
    assert b"".join(sent) == piece * 8 + b"\n\n" + EVENTS[-1]
    assert len(sent) > 2


def test_text_that_looks_like_the_end_is_not_the_end() -> None:
    with pytest.raises(EngineFailure, match="ended early"):
        relay([b'data: {"text":"data: [DONE]"}\n\n'])


def test_comments_are_no_tokens() -> None:
    assert relay([b": ping\n\n", EVENTS[0], b": ping\n\n", EVENTS[-1]]) == [EVENTS[0], b": ping\n\n", EVENTS[-1]]


ROLE = (
    b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}'
    b"\n\n"
)


def test_events_without_anything_of_the_answer_wait_for_some_of_it() -> None:
    assert relay([ROLE, ROLE, *EVENTS[-2:]]) == [ROLE + ROLE + EVENTS[-2], EVENTS[-1]]
    first, *_ = relay([ROLE] * 2000 + EVENTS[-1:])
    assert 2**16 < len(first) < 2**16 + 2 * len(ROLE), "not for ever"
    with pytest.raises(EngineRejected):  # it can still be a status
        relay([ROLE, b'data: {"error":{"code":400,"message":"too long"}}\n\n'])
