"""Logs as JSON, one object a line."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

import orjson

if TYPE_CHECKING:
    from router.lifetime import RequestRecord

request_logger = logging.getLogger("router.requests")


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": record.created,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        line.update(getattr(record, "fields", {}))
        return orjson.dumps(line, default=str).decode()


def log_request(record: RequestRecord) -> None:
    """The one line of a finished request."""
    if request_logger.isEnabledFor(logging.INFO):
        # Made here, because Logger.info would look for the caller's place in the source each time.
        fields = {"name": request_logger.name, "levelno": logging.INFO, "levelname": "INFO", "msg": "request finished"}
        request_logger.handle(logging.makeLogRecord({**fields, "fields": record.as_dict()}))


def configure_logging(level: int = logging.INFO) -> None:
    """For a process that is the router; a library user sets up logging as they like."""
    # What no line here says need not be found out for each (docs.python.org/3/howto/logging.html#optimization).
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
