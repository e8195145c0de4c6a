"""The client towards engines: sends one leg, and turns whatever goes wrong into EngineFailure or EngineRejected."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import aiohttp

from router.errors import EngineFailure, EngineRejected, FailureKind

if TYPE_CHECKING:
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


@contextmanager
def engine_failures(endpoint: Endpoint) -> Iterator[None]:
    """Turns what the HTTP client and the clock raise into EngineFailure."""
    try:
        yield
    except aiohttp.ConnectionTimeoutError as error:
        raise EngineFailure(endpoint, FailureKind.CONNECT_TIMEOUT, "connecting to it timed out") from error
    except TimeoutError as error:
        raise EngineFailure(endpoint, FailureKind.TIMEOUT, "it did not answer in time") from error
    except aiohttp.ClientConnectorError as error:
        reason = error.os_error.strerror or type(error.os_error).__name__
        raise EngineFailure(endpoint, FailureKind.REFUSED, f"it can't be reached ({reason})") from error
    except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError) as error:
        raise EngineFailure(endpoint, FailureKind.DISCONNECT, "the connection broke before the answer's end") from error
    except aiohttp.ClientError as error:
        raise EngineFailure(endpoint, FailureKind.GARBAGE, "its answer is not HTTP") from error


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
