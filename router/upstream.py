"""The client towards engines: sends one leg, and turns whatever goes wrong into EngineFailure or EngineRejected."""

from __future__ import annotations

from typing import TYPE_CHECKING

import aiohttp

from router.errors import EngineFailure, EngineRejected, FailureKind

if TYPE_CHECKING:
    from types import TracebackType

    from router.settings import RouterSettings
    from router.trace_context import TraceHeaders
    from router.types import Endpoint, GenerationRequest


def make_session(settings: RouterSettings) -> aiohttp.ClientSession:
    """One per process, without a limit on connections: admission is not the client's business."""
    connector = aiohttp.TCPConnector(
        limit=0,
        # vLLM's server closes an idle connection after 5 s; a request sent just then would look like a dead engine.
        keepalive_timeout=2.0,
    )
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),  # one client's must not reach another's request; and looking costs time
        auto_decompress=False,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=settings.connect_timeout),
        headers=engine_headers(settings),
    )


def engine_headers(settings: RouterSettings) -> dict[str, str]:
    """What every request to an engine has: no compression, and the engines' API key if they have one."""
    key = settings.engine_key
    return {"Accept-Encoding": "identity"} | ({} if key is None else {"Authorization": f"Bearer {key}"})


class EngineFailures:
    """Turns what the HTTP client and the clock raise within its block into EngineFailure.

    A class, because the frames of a generator that raises lead back to the exception: a cycle of references on Python
    3.12, in which every such request would stay until a full garbage collection.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if isinstance(error, (aiohttp.ClientError, OSError)):  # TimeoutError is an OSError
            raise EngineFailure(self._endpoint, *_kind_and_detail(error)) from error


def _kind_and_detail(error: aiohttp.ClientError | OSError) -> tuple[FailureKind, str]:
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return FailureKind.CONNECT_TIMEOUT, "connecting to it timed out"
    if isinstance(error, TimeoutError):
        return FailureKind.TIMEOUT, "it did not answer in time"
    if isinstance(error, aiohttp.ClientConnectorError):
        reason = error.os_error.strerror or type(error.os_error).__name__
        return FailureKind.REFUSED, f"it can't be reached ({reason})"
    if isinstance(error, (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError)):
        return FailureKind.DISCONNECT, "the connection broke before the answer's end"
    return FailureKind.GARBAGE, "its answer is not HTTP"


async def post(
    session: aiohttp.ClientSession,
    endpoint: Endpoint,
    request: GenerationRequest,
    body: bytes,
    trace_headers: TraceHeaders = (),
) -> aiohttp.ClientResponse:
    """The engine's 200, its body not read yet. Raises EngineFailure or EngineRejected for every other answer.

    `trace_headers` are this leg's; without them the client's own go to the engine.
    """
    return await post_to(session, endpoint, request.api, request.id, body, trace_headers or request.trace_headers)


async def post_to(
    session: aiohttp.ClientSession,
    endpoint: Endpoint,
    path: str,
    request_id: str,
    body: bytes,
    trace_headers: TraceHeaders,
) -> aiohttp.ClientResponse:
    """As `post`, of what is not the client's request itself.

    Cancelling closes the connection, which makes vLLM abort the request.
    """
    headers = {"X-Request-Id": request_id, **dict(trace_headers)}
    data = aiohttp.BytesPayload(body, content_type="application/json")  # else aiohttp tries every type that it knows
    response = await session.post(endpoint.url + path, data=data, headers=headers, allow_redirects=False)
    if response.status == 200:
        return response
    async with response:
        answer = await response.read()
    if 400 <= response.status < 500:
        raise EngineRejected(response.status, answer)
    raise EngineFailure(endpoint, FailureKind.STATUS, f"it answered with status {response.status}")
