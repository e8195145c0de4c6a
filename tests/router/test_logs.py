from __future__ import annotations

import logging
import sys
from typing import Any

import orjson
import pytest

from router.lifetime import Attempt, Moment, RequestRecord
from router.logs import JsonFormatter
from router.types import Api, Endpoint, Outcome, Role
from tests.router.conftest import Stack, StartStack
from tests.router.running import wait_for
from tests.router.scripted_engine import Behaviour, raw_stream, status


def make_record(message: str, **extra: object) -> logging.LogRecord:
    record = logging.LogRecord("router.requests", logging.INFO, __file__, 1, message, (), None)
    record.__dict__.update(extra)
    return record


def test_a_line_is_one_json_object() -> None:
    request = RequestRecord("abc", Api.CHAT, outcome=Outcome.OK)
    request.attempts.append(Attempt(Endpoint(Role.DECODE, "http://a:1"), Outcome.OK))
    request.mark(Moment.DECODE_SENT)
    line = JsonFormatter().format(make_record("request finished", fields=request.as_dict()))
    assert "\n" not in line
    parsed = orjson.loads(line)
    assert parsed["message"] == "request finished"
    assert parsed["request_id"] == "abc"
    assert parsed["attempts"] == [{"role": "decode", "engine": "a:1", "outcome": "ok"}]
    assert set(parsed["moments"]) == {"received", "decode_sent"}


def test_a_traceback_stays_on_the_line() -> None:
    try:
        raise ValueError("boom")
    except ValueError:
        record = make_record("failed", exc_info=sys.exc_info())
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert "boom" in orjson.loads(line)["exception"]


SECRET = "my-own-words"


def engine_error(code: int) -> Behaviour:
    return status(code, b'{"error":{"message":"bad input: %s"}}' % SECRET.encode())


@pytest.mark.parametrize(
    ("behaviour", "fields"),
    [
        (None, {}),
        (None, {"prompt": {"not a prompt": SECRET}}),
        (None, {"temperature": SECRET}),
        (engine_error(400), {}),
        (engine_error(500), {}),
        (raw_stream(b'data: {"error":{"code":500,"message":"%s"}}\n\n' % SECRET.encode()), {"stream": True}),
    ],
)
def test_no_line_holds_the_clients_text(
    start_stack: StartStack, caplog: pytest.LogCaptureFixture, behaviour: Behaviour | None, fields: dict[str, Any]
) -> None:
    stack = start_stack()
    if behaviour is not None:
        stack.decode[0].behaviour = behaviour
    with caplog.at_level(logging.DEBUG):
        headers = {"Authorization": f"Bearer {SECRET}", "X-Request-Id": "known"}
        stack.router.complete(headers, **{"prompt": SECRET, "user": SECRET, **fields})
        wait_for(lambda: any(record.name == "router.requests" for record in caplog.records))
    lines = [JsonFormatter().format(record) for record in caplog.records]
    assert any('"request_id":"known"' in line for line in lines)
    assert not [line for line in lines if SECRET in line]


def test_a_line_stays_short_whatever_the_client_sends(stack: Stack, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "router.requests"):
        answer = stack.router.complete(model="m" * 100_000)
        wait_for(lambda: caplog.records)
    assert answer.status == 404
    assert len(JsonFormatter().format(caplog.records[0])) < 3000
