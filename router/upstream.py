"""The client towards engines: sends one leg, and turns whatever goes wrong into EngineFailure or EngineRejected."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import aiohttp
import orjson

from router.continuation import tokenize_body
from router.engine_client import ConnectFailedError, ConnectTimeoutError, NotHttpError
from router.errors import EngineFailure, EngineRejected, FailureKind

if TYPE_CHECKING:
    from router.engine_client import EngineClient, EngineResponse
    from router.settings import RouterSettings
    from router.types import Endpoint, GenerationRequest


ENGINE_HEADERS = {"Accept-Encoding": "identity"}


def make_session(settings: RouterSettings) -> aiohttp.ClientSession:
    """One per process, without a limit on connections: admission is not the client's business."""
    connector = aiohttp.TCPConnector(
        limit=0,
        # vLLM's server closes an idle connection after 5 s; a request sent just then would look like a dead engine.
        keepalive_timeout=2.0,
    )
    return aiohttp.ClientSession(
        connector=connector,
        auto_decompress=False,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=settings.connect_timeout),
        headers=ENGINE_HEADERS,
    )


TOKENIZE_TIMEOUT = 10.0  # s; a client is waiting in mid-stream


@contextmanager
def engine_failures(endpoint: Endpoint) -> Iterator[None]:
    """Turns what the HTTP client and the clock raise into EngineFailure."""
    try:
        yield
    except (aiohttp.ConnectionTimeoutError, ConnectTimeoutError) as error:
        raise EngineFailure(endpoint, FailureKind.CONNECT_TIMEOUT, "connecting to it timed out") from error
    except TimeoutError as error:
        raise EngineFailure(endpoint, FailureKind.TIMEOUT, "it did not answer in time") from error
    except aiohttp.ClientConnectorError as error:
        reason = error.os_error.strerror or type(error.os_error).__name__
        raise EngineFailure(endpoint, FailureKind.REFUSED, f"it can't be reached ({reason})") from error
    except ConnectFailedError as error:
        raise EngineFailure(endpoint, FailureKind.REFUSED, f"it can't be reached ({error.strerror})") from error
    except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError) as error:
        raise EngineFailure(endpoint, FailureKind.DISCONNECT, "the connection broke before the answer's end") from error
    except (aiohttp.ClientError, NotHttpError) as error:
        raise EngineFailure(endpoint, FailureKind.GARBAGE, "its answer is not HTTP") from error


async def fetch_prompt_ids(session: aiohttp.ClientSession, endpoint: Endpoint, request: GenerationRequest) -> list[int]:
    """The request's prompt in tokens, as the engine sees it. Raises EngineFailure."""
    body = tokenize_body(request)
    if body is None:
        given: list[int] = request.body["prompt"]
        return given
    with engine_failures(endpoint):
        async with asyncio.timeout(TOKENIZE_TIMEOUT):
            headers = {"Content-Type": "application/json"}
            async with session.post(endpoint.url + "/tokenize", data=body, headers=headers) as response:
                answer = await response.read()
    try:
        tokens: list[int] = orjson.loads(answer)["tokens"]
    except (ValueError, TypeError, KeyError) as error:
        detail = f"/tokenize answered with status {response.status} and no tokens"
        raise EngineFailure(endpoint, FailureKind.GARBAGE, detail) from error
    return tokens


async def post(client: EngineClient, endpoint: Endpoint, request: GenerationRequest, body: bytes) -> EngineResponse:
    """The engine's 200, its body not read yet. Raises EngineFailure or EngineRejected for every other answer.

    Cancelling closes the connection, which makes vLLM abort the request.
    """
    headers = {"Content-Type": "application/json", "X-Request-Id": request.id, **dict(request.trace_headers)}
    response = await client.post(endpoint.url, request.api, headers, body)
    if response.status == 200:
        return response
    async with response:
        answer = await response.read()
    if 400 <= response.status < 500:
        raise EngineRejected(response.status, answer)
    raise EngineFailure(endpoint, FailureKind.STATUS, f"it answered with status {response.status}")
