"""A limit to how long this process waits for a host that no longer answers.

A link that is cut closes no connection. Linux sends what was not acknowledged again for about 15 minutes
(net.ipv4.tcp_retries2), and does not probe a connection meanwhile, whatever its keepalive says (tcp(7)).
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from pathlib import Path

SILENCE_SECONDS = 20
"""Longer than a switch or a route takes to come back, shorter than a client's patience."""

_PROBE_SECONDS = 5


class SilenceLimit:
    """Applied again and again, since libraries such as UCX open connections when they like and leave it unset."""

    def __init__(self, seconds: int = SILENCE_SECONDS) -> None:
        self._seconds = seconds
        self._applied = -1.0

    def apply(self) -> None:
        """Limits every TCP connection of this process; at most once a second, some 10 us for each open file."""
        now = time.monotonic()
        if now - self._applied < 1.0:
            return
        self._applied = now
        for entry in Path("/proc/self/fd").iterdir():
            # Files come and go meanwhile.
            with suppress(OSError):
                if str(entry.readlink()).startswith("socket:"):
                    with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                        if connection.family in (socket.AF_INET, socket.AF_INET6):
                            limit_silence(connection, self._seconds)


def limit_silence(connection: socket.socket, seconds: int) -> None:
    """Has the kernel end this connection, with TimeoutError for whoever uses it, when nothing came back for so
    long."""
    probe = min(_PROBE_SECONDS, max(1, seconds // 4))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, probe)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, probe)
    # For what was sent, and, in place of a number of probes, for a connection at rest.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, seconds * 1000)
