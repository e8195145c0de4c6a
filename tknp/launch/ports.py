"""Free ports for the engines."""

from __future__ import annotations

import random
import socket
from contextlib import closing

from tknp.launch.options import CannotServeError

# Below Linux's range for outgoing connections (32768 and up), so that none takes a port between its choice and its use.
_RANGE = range(20_000, 32_000)


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now.

    Raises:
        CannotServeError: `host` is no address of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise CannotServeError(f"--host {host} is no address of this machine: {error.strerror or error}") from error
    with closing(listener):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            if error.errno == 99:  # EADDRNOTAVAIL
                raise CannotServeError(f"--host {host} is no address of this machine") from error
            return False
    return True


def choose_ports(num_ports: int, host: str = "127.0.0.1") -> list[int]:
    """Free ports, all different. From a random start, so that two `tknp serve` at once hardly ever choose the same."""
    start = random.randrange(len(_RANGE))
    chosen = []
    for step in range(len(_RANGE)):
        port = _RANGE[(start + step) % len(_RANGE)]
        if is_free(host, port):
            chosen.append(port)
            if len(chosen) == num_ports:
                return chosen
    raise CannotServeError(f"{num_ports} free ports were needed between {_RANGE.start} and {_RANGE.stop}")
