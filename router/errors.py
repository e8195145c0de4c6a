"""What can go wrong with a request, each with its HTTP status and OpenAI error type, and the one translator."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

import orjson

from router.types import Outcome, Rejection

if TYPE_CHECKING:
    from router.types import Endpoint


class RouterError(Exception):
    """An error that a client gets to read: one sentence with what was wrong, the numbers, and what to do."""

    status = 500
    type = "server_error"
    code: str | None = "internal_error"
    outcome = Outcome.FAILED
    closes_connection = False  # a body that was not read to its end leaves no place for another request

    def __init__(self, message: str, *, param: str | None = None, logged: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.logged = logged or message  # the same without what it quotes: logs hold nothing of the client's text

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"connection", b"close")] if self.closes_connection else []


class InvalidRequest(RouterError):
    status, type, code, outcome = 400, "invalid_request_error", "invalid_value", Outcome.INVALID


class ModelNotFound(InvalidRequest):
    status, code = 404, "model_not_found"


class UnsupportedModel(InvalidRequest):
    code = "unsupported_model"


class NotFound(InvalidRequest):
    status, code = 404, "not_found"


class MethodNotAllowed(InvalidRequest):
    status, code = 405, "method_not_allowed"


class BodyTimeout(InvalidRequest):
    status, code, closes_connection = 408, "request_timeout", True


class HeaderTimeout(BodyTimeout):
    pass


class BodyTooLarge(InvalidRequest):
    status, code, closes_connection = 413, "request_too_large", True


class CompressedBody(InvalidRequest):
    status, code, closes_connection = 415, "unsupported_content_encoding", True


class HeadersTooLarge(InvalidRequest):
    status, code, closes_connection = 431, "headers_too_large", True


class InvalidKey(InvalidRequest):
    """No API key, or one that is not known. The message never holds what was sent."""

    status, code = 401, "invalid_api_key"

    def __init__(self, message: str, *, is_missing: bool, takes_basic: bool = False) -> None:
        super().__init__(message)
        self.is_missing = is_missing
        self._schemes = b'Bearer, Basic realm="tknp, the key is the password"' if takes_basic else b"Bearer"

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"www-authenticate", self._schemes)]


class Forbidden(InvalidRequest):
    status, code = 403, "forbidden"


class StreamBroken(RouterError):
    """Another engine went on with a stream, and not as the one before had begun."""

    status, code = 502, "engine_failure"


class NoEngine(RouterError):
    status, type, code, outcome = 503, "service_unavailable_error", "no_engine_available", Outcome.UNAVAILABLE

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after  # s

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"retry-after", str(self.retry_after).encode())]


class Overloaded(RouterError):
    """There is no room for the request now. 429 if the caller has too much here, 503 if everybody together has."""

    type, outcome = "service_unavailable_error", Outcome.OVERLOADED

    def __init__(self, message: str, reason: Rejection, *, retry_after: int) -> None:
        super().__init__(f"{message} Retry in {retry_after} s.")
        self.reason = reason
        self.retry_after = retry_after  # s
        if reason is Rejection.KEY_LIMIT:
            self.status, self.type, self.code = 429, "rate_limit_error", "rate_limit_exceeded"
        else:
            self.status, self.code = 503, "overloaded"

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"retry-after", str(self.retry_after).encode())]


class TooManyConnections(RouterError):
    status, type, code, outcome = 503, "service_unavailable_error", "too_many_connections", Outcome.OVERLOADED
    closes_connection = True

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"retry-after", b"5"), *super().headers]


class DeadlineExceeded(RouterError):
    """The time that the client gave its request is over."""

    status, type, code, outcome = 504, "timeout_error", "deadline_exceeded", Outcome.TIMEOUT


class ClientStalled(RouterError):
    """The client does not take what it is sent; it will hardly read this either."""

    status, code, outcome = 408, "client_stalled", Outcome.CANCELLED


class ShuttingDown(RouterError):
    status, type, code = 503, "service_unavailable_error", "router_shutting_down"


class EngineRejected(RouterError):
    """An engine's own 4xx. Its status and body pass through: they hold the engine's numbers."""

    type, code, outcome = "invalid_request_error", "engine_rejected", Outcome.REJECTED

    def __init__(self, status: int, body: bytes) -> None:
        refusal = f"The engine refused the request with status {status}"
        super().__init__(f"{refusal}: {body[:500].decode(errors='replace')}", logged=f"{refusal}.")
        self.status = status
        self.body = body


class FailureKind(StrEnum):
    REFUSED = "refused"  # nobody listens there
    CONNECT_TIMEOUT = "connect_timeout"  # nobody accepted in time: the engine's host is overloaded, or this one is
    DISCONNECT = "disconnect"  # the connection broke, or the answer ended early
    STATUS = "status"  # a 5xx
    TIMEOUT = "timeout"
    GARBAGE = "garbage"  # an answer that is not what vLLM sends


_RETRY = " Please retry the request."


class EngineFailure(RouterError):
    """An engine did not do its part. Another one may; when none is left, the client reads this as 502 or 504."""

    def __init__(self, endpoint: Endpoint, kind: FailureKind, detail: str, quoted: str = "") -> None:
        """`quoted` is text of the engine's, which may hold the client's: only the client reads it."""
        failed = f"The {endpoint.role} engine {endpoint.name} failed: {detail}"
        super().__init__(f"{failed}{quoted and f': {quoted}'}.{_RETRY}", logged=f"{failed}." if quoted else None)
        self.endpoint = endpoint
        self.kind = kind
        self.detail = detail
        timed_out = kind in (FailureKind.TIMEOUT, FailureKind.CONNECT_TIMEOUT)
        self.status = 504 if timed_out else 502
        self.code = "engine_timeout" if timed_out else "engine_failure"
        self.outcome = Outcome.TIMEOUT if timed_out else Outcome.FAILED

    def broke_stream(self, why: str, logged: str) -> None:
        """Adds why no other engine went on with the stream that this one began."""
        goes_on = "No other engine can go on with the stream, because"
        self.message = f"{self.message.removesuffix(_RETRY)} {goes_on} {why}.{_RETRY}"
        self.logged = f"{self.logged.removesuffix(_RETRY)} {goes_on} {logged}."

    @property
    def is_death(self) -> bool:
        """Nobody is there any more, as opposed to somebody who is slow or confused."""
        return self.kind in (FailureKind.REFUSED, FailureKind.DISCONNECT)

    @property
    def reached_engine(self) -> bool:
        """False if it is certain that the engine got nothing of the request."""
        return self.kind not in (FailureKind.REFUSED, FailureKind.CONNECT_TIMEOUT)


def error_body(error: RouterError) -> bytes:
    """OpenAI's error body."""
    if isinstance(error, EngineRejected) and error.body.lstrip().startswith(b'{"error"'):
        return error.body
    fields = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return orjson.dumps({"error": fields})


def error_event(error: RouterError, is_named: bool = False) -> bytes:
    """The same as a server-sent event, for a stream that already has its 200.

    In the Responses API events have names, and an error's fields stand beside its type; OpenAI's own client looks for
    the object `error` in both.
    """
    body = error_body(error)
    if not is_named:
        return b"data: " + body + b"\n\n"
    fields = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
    return b"event: error\ndata: " + orjson.dumps({**fields, **orjson.loads(body)}) + b"\n\n"
