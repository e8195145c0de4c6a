from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from typing import Any

import pytest

from router.errors import EngineFailure
from router.hosts import EngineHosts, is_local, split_patterns
from router.types import Endpoint, Role
from tests.router.conftest import StartStack
from tests.router.running import wait_for
from tests.router.scripted_engine import KV_PARAMS, ScriptedEngine, status

REMOTE = (
    "http://203.0.113.5:8100",
    "http://[2001:db8::5]:8100",
    "http://node7.cluster:8100",
)  # nobody's: documentation


def are_allowed(host: Any, urls: Sequence[str] = REMOTE[:2], patterns: Sequence[str] = ()) -> bool:
    endpoints = [Endpoint(Role.PREFILL, url) for url in urls]

    async def ask() -> bool:
        try:
            await EngineHosts(endpoints, patterns).check(endpoints[0], {"remote_host": host})
        except EngineFailure as failure:
            assert repr(host)[:50] in failure.message
            assert "--allowed-engine-hosts" in failure.message
            return False
        return True

    return asyncio.run(ask())


@pytest.mark.parametrize("host", ["203.0.113.5", "2001:db8::5", "2001:DB8:0:0::5", None])
def test_the_hosts_of_the_urls_are_allowed(host: str | None) -> None:
    assert are_allowed(host)


@pytest.mark.parametrize(
    "host",
    [
        *("203.0.113.6", "127.0.0.1", "localhost", "::1", "0.0.0.0", "169.254.169.254", "metadata.internal", ""),
        *(
            "203.0.113.5.evil.example",
            "203.0.113.5:99",
            "http://203.0.113.5",
            " 203.0.113.5",
            "3405803781",
            7,
            ["x"],
            {},
        ),
        "x" * 10_000,
    ],
)
def test_no_other_host_is(host: Any) -> None:
    assert not are_allowed(host)


@pytest.mark.parametrize(
    ("host", "patterns", "expected"),
    [
        ("10.1.2.3", ["10.0.0.0/8"], True),
        ("11.1.2.3", ["10.0.0.0/8"], False),
        ("10.1.2.3", ["10.1.2.3"], True),
        ("fd00::1", ["fd00::/8"], True),
        ("p0.engines.local", ["*.engines.local"], True),
        ("P0.Engines.Local", ["*.engines.local"], True),
        ("engines.local", ["*.engines.local"], False),
        ("p0.engines.local.evil.example", ["*.engines.local"], False),
        ("10.1.2.3.evil.example", ["10.0.0.0/8"], False),
        ("203.0.113.5", ["10.0.0.0/8"], True),  # what the URLs name stays allowed
    ],
)
def test_patterns_allow_more(host: str, patterns: list[str], expected: bool) -> None:
    assert are_allowed(host, patterns=patterns) is expected


def test_an_address_of_an_engine_that_is_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM tells its address; the URL may have a name, which then is looked up, and not for every request."""
    asked: list[str] = []

    async def getaddrinfo(self: object, host: str, port: object, **_: object) -> list[Any]:
        asked.append(host)
        if host == "gone.cluster":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("203.0.113.7", 0))]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    endpoint = Endpoint(Role.PREFILL, REMOTE[2])

    async def ask() -> None:
        hosts = EngineHosts([endpoint, Endpoint(Role.DECODE, "http://gone.cluster:1")], ())
        await hosts.check(endpoint, {"remote_host": "node7.cluster"})
        assert not asked
        for _ in range(3):
            await hosts.check(endpoint, {"remote_host": "203.0.113.7"})
        assert sorted(asked) == ["gone.cluster", "node7.cluster"]
        with pytest.raises(EngineFailure):
            await hosts.check(endpoint, {"remote_host": "203.0.113.8"})
        with pytest.raises(EngineFailure):
            await hosts.check(endpoint, {"remote_host": "node8.cluster"})

    asyncio.run(ask())


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "localhost"])
def test_this_machine_is_one_host_while_every_engine_is_on_it(host: str) -> None:
    local = "http://127.0.0.1:8100"
    assert are_allowed(host, [local])
    assert are_allowed(host, [local, REMOTE[0]]) is (host != "127.0.0.9")
    assert not are_allowed("203.0.113.9", [local])


def test_addresses_of_this_machine() -> None:
    assert is_local("127.0.0.1")
    assert not any(map(is_local, ("0.0.0.0", "::", "203.0.113.1", "224.0.0.1")))


@pytest.mark.parametrize("pattern", ["10.0.0.0/99", "http://a", "a b", "*", "", "a/b", "*.*"])
def test_bad_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="a host is a name"):
        split_patterns([pattern])


def params_from(host: str) -> Any:
    text = str({**KV_PARAMS, "remote_host": host}).replace("'", '"').replace("True", "true").replace("False", "false")
    return status(200, f'{{"kv_transfer_params": {text}}}'.encode())


@pytest.mark.parametrize("decode_only", [False, True])
def test_a_decode_engine_never_hears_of_a_foreign_host(start_stack: StartStack, decode_only: bool) -> None:
    stack = start_stack(num_prefill=2, decode_only=decode_only)
    evil: ScriptedEngine = stack.prefill[0]
    evil.behaviour = params_from("203.0.113.66")
    for _ in range(4):
        assert stack.router.complete().status == 200  # by the other prefill engine
    assert evil.seen
    stack.prefill[1].behaviour = evil.behaviour
    last = stack.router.complete()
    assert last.status == (200 if decode_only else 502)
    assert decode_only or "203.0.113.66" in last.error["message"]
    assert not any("203.0.113.66" in seen.raw.decode() for seen in stack.decode[0].seen)


def test_an_engine_can_not_send_the_router_anywhere(start_stack: StartStack) -> None:
    stack = start_stack(num_decode=2)
    elsewhere, redirecting = stack.decode
    redirecting.health_headers = {"Location": f"{elsewhere.url}/health"}
    redirecting.health_status = 307
    wait_for(lambda: "status 307" in stack.router.state.pool.engines[2].down_reason)


def test_an_allowed_host_passes(start_stack: StartStack) -> None:
    stack = start_stack(allowed_engine_hosts="203.0.113.0/24")
    stack.prefill[0].behaviour = params_from("203.0.113.66")
    assert stack.router.complete().status == 200
    assert stack.decode[0].seen[0].body["kv_transfer_params"]["remote_host"] == "203.0.113.66"
