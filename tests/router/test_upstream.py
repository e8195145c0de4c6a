from __future__ import annotations

import asyncio
import errno
import os
from unittest.mock import Mock

import aiohttp
import pytest

from router.engines import Engine
from router.errors import EngineFailure, FailureKind
from router.types import Endpoint, Role
from router.upstream import EngineFailures

ENDPOINT = Endpoint(Role.DECODE, "http://a:1")


def connector_error(number: int) -> aiohttp.ClientConnectorError:
    return aiohttp.ClientConnectorError(Mock(ssl=True), OSError(number, os.strerror(number)))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (aiohttp.ConnectionTimeoutError(), FailureKind.CONNECT_TIMEOUT),
        (connector_error(errno.ECONNREFUSED), FailureKind.REFUSED),
        (aiohttp.ServerDisconnectedError(), FailureKind.DISCONNECT),
        (aiohttp.ClientOSError(errno.EPIPE, "Broken pipe"), FailureKind.DISCONNECT),
        (aiohttp.ClientPayloadError(), FailureKind.DISCONNECT),
        (ConnectionResetError(), FailureKind.DISCONNECT),
        (TimeoutError(), FailureKind.TIMEOUT),
        (aiohttp.ServerTimeoutError(), FailureKind.TIMEOUT),
        (aiohttp.ClientResponseError(Mock(), ()), FailureKind.GARBAGE),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_client_raises_is_named(error: Exception, kind: FailureKind) -> None:
    with pytest.raises(EngineFailure) as caught, EngineFailures(ENDPOINT):
        raise error
    assert caught.value.kind is kind
    assert caught.value.__cause__ is error


def test_a_cancellation_is_no_failure() -> None:
    with pytest.raises(asyncio.CancelledError), EngineFailures(ENDPOINT):
        raise asyncio.CancelledError


@pytest.mark.parametrize("kind", FailureKind)
def test_only_a_refused_connection_takes_an_engine_out_at_once(kind: FailureKind) -> None:
    engine = Engine(ENDPOINT)
    engine.mark_up({"tiny": {}}, {})
    engine.suspect(EngineFailure(ENDPOINT, kind, "it failed"))
    assert engine.is_up is (kind is not FailureKind.REFUSED)
    assert engine.suspected.is_set()
