"""Which hosts an engine may name to another one.

A prefill engine's answer says where its KV cache is, and the decode engine connects there. An engine that was broken
into must not be able to send others anywhere, so a host that is not an engine's is refused before anybody hears of it.
"""

from __future__ import annotations

import asyncio
import fnmatch
import ipaddress
import logging
import socket
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from router.errors import EngineFailure, FailureKind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from router.types import Endpoint, JsonObject

logger = logging.getLogger(__name__)

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

KEEP_ADDRESSES = 30.0  # s; engines that move to another address do so in minutes
ASK_AGAIN = 2.0  # s until an address that no engine had is looked up once more
LOOK_UP_TIMEOUT = 5.0  # s


class EngineHosts:
    """The hosts of the engines' URLs, the addresses that these resolve to, and what the operator allows besides.

    While every engine is on this machine, all of its addresses are allowed: an engine that listens on all of them names
    the one that others would reach it at.
    """

    def __init__(self, endpoints: Iterable[Endpoint], patterns: Iterable[str]) -> None:
        self.follow(endpoints)
        networks, names = split_patterns(patterns)
        self._networks, self._names = networks, names
        self._lock = asyncio.Lock()

    def follow(self, endpoints: Iterable[Endpoint]) -> None:
        """From now on these are the engines; what was known of others is forgotten."""
        self._engine_hosts = {host for endpoint in endpoints if (host := urlsplit(endpoint.url).hostname)}
        self._allowed = set(self._engine_hosts)  # exact, and what matched a pattern before
        self._addresses: set[str] = set()
        self._looked_up_at = float("-inf")
        self._all_local = False

    async def check(self, endpoint: Endpoint, params: JsonObject | None) -> None:
        """Raises EngineFailure if the `kv_transfer_params` that the engine answered with name a foreign host."""
        host: Any = params.get("remote_host") if params else None
        if host is None or (isinstance(host, str) and (host in self._allowed or await self.allows(host))):
            return
        shown = repr(host)[:100]
        logger.error("%s says that its KV cache is on %s, which is not a host of an engine", endpoint.name, shown)
        raise EngineFailure(
            endpoint,
            FailureKind.GARBAGE,
            f"it says that its KV cache is on {shown}, which is not a host of an engine "
            "(if it should be, add it to --allowed-engine-hosts)",
        )

    async def allows(self, host: str) -> bool:
        """Host names are compared as they are: what one resolves to here may be another address elsewhere."""
        host = host.lower()
        address = _parse(host)
        if address is None:
            if any(fnmatch.fnmatchcase(host, name) for name in self._names) or host in self._allowed:
                return True
            return host == "localhost" and await self._is_engines("127.0.0.1")
        if any(address in network for network in self._networks):
            self._allowed.add(host)
            return True
        return await self._is_engines(str(address))

    async def _is_engines(self, address: str) -> bool:
        now = asyncio.get_running_loop().time
        async with self._lock:
            found = self._has(address)
            if now() - self._looked_up_at > (KEEP_ADDRESSES if found else ASK_AGAIN):
                await self._look_up()
                self._looked_up_at = now()
                found = self._has(address)
        return found

    def _has(self, address: str) -> bool:
        return address in self._addresses or (self._all_local and is_local(address))

    async def _look_up(self) -> None:
        hosts = None
        while hosts is not self._engine_hosts:  # others may have joined meanwhile
            hosts = self._engine_hosts
            found = await asyncio.gather(*(_resolve(host) for host in hosts))
        self._addresses = set().union(*found)
        self._all_local = all(addresses and all(map(is_local, addresses)) for addresses in found)


def split_patterns(patterns: Iterable[str]) -> tuple[list[Network], list[str]]:
    """Networks, single addresses among them, and host names with `*` for any part. Raises ValueError."""
    networks, names = [], []
    for pattern in patterns:
        text = pattern.strip().lower()
        try:
            networks.append(ipaddress.ip_network(text, strict=False))
        except ValueError:
            if "/" in text or not all(char.isalnum() or char in "-._*" for char in text) or not text.strip("*."):
                raise ValueError(
                    f"a host is a name such as *.engines.local, an address or a network such as 10.0.0.0/8, "
                    f"not {pattern!r}"
                ) from None
            names.append(text)
    return networks, names


def is_local(address: str) -> bool:
    """Whether it is an address of this machine: one that can be listened on."""
    parsed = ipaddress.ip_address(address)
    if parsed.is_unspecified or parsed.is_multicast:
        return False
    family = socket.AF_INET if parsed.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def _parse(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


async def _resolve(host: str) -> set[str]:
    try:
        async with asyncio.timeout(LOOK_UP_TIMEOUT):
            infos = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, TimeoutError) as error:
        logger.warning("the engine host %s can't be resolved: %s", host, error or "it timed out")
        return set()
    return {str(info[4][0]).partition("%")[0] for info in infos}
