"""TCP ports: free ones for servers that are about to start, and waiting for one that is still taken."""

from __future__ import annotations

import errno
import random
import socket
import time

# Below Linux's range for connections and for servers that take any port (32768 and up): an engine listens half a minute
# after its port was chosen, and by then its libraries have been handed hundreds of those.
_RANGE = range(20_000, 32_000)
_POLL_SECONDS = 0.1


class PortError(RuntimeError):
    """A server can't listen there."""


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now.

    Raises:
        PortError: `host` is no address of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise PortError(f"{host} is no address of this machine: {error.strerror or error}") from error
    with listener:
        # As servers do: what is left of the connections of the one before is in nobody's way.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise PortError(f"{host} is no address of this machine") from error
            return False
    return True


def choose_ports(num_ports: int, host: str = "127.0.0.1") -> list[int]:
    """Free ports, all different. From a random start, so that two that choose at once hardly ever choose the same.

    Raises:
        PortError: there are not so many.
    """
    start = random.randrange(len(_RANGE))
    chosen = []
    for step in range(len(_RANGE)):
        port = _RANGE[(start + step) % len(_RANGE)]
        if is_free(host, port):
            chosen.append(port)
            if len(chosen) == num_ports:
                return chosen
    raise PortError(f"{num_ports} free ports were needed between {_RANGE.start} and {_RANGE.stop}")


def free_port() -> int:
    """One at every address of this machine."""
    return choose_ports(1, "0.0.0.0")[0]


def wait_until_free(host: str, port: int, patience: float) -> None:
    """Returns as soon as a server could listen there; whoever did before may not be gone yet.

    Raises:
        PortError: it is taken after `patience` seconds, too, or `host` is no address of this machine.
    """
    deadline = time.monotonic() + patience
    while not is_free(host, port):
        if time.monotonic() > deadline:
            raise PortError(f"port {port} of {host} is in use, and still was after {patience:g} s")
        time.sleep(_POLL_SECONDS)
