"""A limit to how long this process waits for a host that no longer answers.

A link that is cut closes no connection. Linux sends what was not acknowledged again for about 15 minutes
(net.ipv4.tcp_retries2), and does not probe a connection meanwhile, whatever its keepalive says (tcp(7)).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress

SILENCE_SECONDS = 20
"""Longer than a switch or a route takes to come back, shorter than a client's patience."""

_PROBE_SECONDS = 5


class SilenceLimit:
    """Applied again and again, since libraries such as UCX open connections when they like and leave it unset."""

    def __init__(self, seconds: int = SILENCE_SECONDS) -> None:
        self._seconds = seconds
        self._applied = -1.0
        self._known: set[tuple[str, str]] = set()

    def apply(self) -> None:
        """Limits every TCP connection of this process; at most once a second, some 4 us for each open file, and 10 for
        each socket that is new."""
        now = time.monotonic()
        if now - self._applied < 1.0:
            return
        self._applied = now
        sockets = set(_sockets())
        for number, _ in sockets - self._known:
            with suppress(OSError), socket.socket(fileno=os.dup(int(number))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    limit_silence(connection, self._seconds)
        self._known = sockets


def _sockets() -> Iterator[tuple[str, str]]:
    """Number and name of each that this process has open; the name, `socket:[...]`, is the kernel's, and no other's."""
    for number in os.listdir("/proc/self/fd"):  # noqa: PTH208 - a path of each would take longer than all the rest
        with suppress(OSError):  # files come and go meanwhile
            if (name := os.readlink(f"/proc/self/fd/{number}")).startswith("socket:"):  # noqa: PTH115
                yield number, name


def limit_silence(connection: socket.socket, seconds: int) -> None:
    """Has the kernel end this connection, with TimeoutError for whoever uses it, when nothing came back for so
    long."""
    probe = min(_PROBE_SECONDS, max(1, seconds // 4))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, probe)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, probe)
    # For what was sent, and, in place of a number of probes, for a connection at rest.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, seconds * 1000)
