from __future__ import annotations

import logging
import sys

import orjson

from router.lifetime import Attempt, Moment, RequestRecord
from router.logs import JsonFormatter
from router.types import Api, Endpoint, Outcome, Role


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
