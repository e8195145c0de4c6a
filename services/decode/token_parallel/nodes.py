"""How the hosts of one engine learn that another one is gone.

A host that dies, or whose link is cut, closes no connection, so whoever waits for its rows waits for minutes. Each host
therefore keeps one TCP connection to host 0 that carries nothing but a hello and a farewell. The kernel probes whether
the other side is still there, and closes the connections of a process that dies.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable

import psutil

from services.decode.token_parallel.options import Nodes, UnsupportedConfigurationError
from tknp.common.silence import limit_silence

LOSS_SECONDS = 10
"""A host that has not been heard of for so long is gone."""

_HELLO = b"tknp node %d\n"
_FAREWELL = b"farewell\n"
_RETRY_SECONDS = 0.5


def watch_port(nodes: Nodes) -> int:
    """The port of host 0 that the others connect to; the one before is torch.distributed's."""
    return nodes.master_port + 1


def prepare_network(nodes: Nodes) -> None:
    """Sets by which address this host is reached, and which interface that is, where the user did not.

    Raises:
        UnsupportedConfigurationError: the other hosts can't reach that address.
    """
    own = os.environ.get("VLLM_HOST_IP") or _address_towards(nodes.master_addr)
    if own.startswith("127.") or own == "::1":
        raise UnsupportedConfigurationError(
            f"--master-addr is {nodes.master_addr!r}, from where this host is {own}, which other hosts can't reach; "
            "give the address of host 0 in the network that all hosts of the engine are in, or set VLLM_HOST_IP"
        )
    os.environ["VLLM_HOST_IP"] = own
    prefer_interface_of(own)


def prefer_interface_of(address: str) -> None:
    """Has torch.distributed's backends use the interface with this address, where the user named none. gloo would take
    the one that the host's name stands for, which in many images is the loopback."""
    for name, addresses in psutil.net_if_addrs().items():
        if address in {known.address for known in addresses}:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def _address_towards(host: str) -> str:
    family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing
        return str(probe.getsockname()[0])


class NodeWatch:
    """Tells when a host is lost. Host 0 listens to all others, and each of them to host 0."""

    def __init__(self, nodes: Nodes, on_loss: Callable[[str], None], on_farewell: Callable[[], None]) -> None:
        """Args:
        on_loss: called once, in a thread, with what happened.
        on_farewell: called once, in a thread, when host 0 has ended the engine in order.
        """
        self._nodes = nodes
        self._on_loss = on_loss
        self._on_farewell = on_farewell
        self._connections: dict[int, socket.socket] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._listener: socket.socket | None = None
        if nodes.rank == 0:
            dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            try:
                self._listener = socket.create_server(("", watch_port(nodes)), family=family, dualstack_ipv6=dual)
            except OSError as error:
                raise UnsupportedConfigurationError(
                    f"port {watch_port(nodes)}, the one after --master-port, can't be had on this host: "
                    f"{error.strerror}; choose another --master-port, the same on all hosts"
                ) from error
        run = self._follow if self._listener is None else self._lead
        threading.Thread(target=run, daemon=True, name="token-parallel-nodes").start()

    def close(self, orderly: bool) -> None:
        """Ends the watch; `orderly` lets the other hosts know that the engine ends because it was asked to."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._listener is not None:
            self._listener.close()
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                if orderly and self._nodes.rank == 0:
                    connection.sendall(_FAREWELL)
                connection.shutdown(socket.SHUT_RDWR)

    def _lead(self) -> None:
        assert self._listener is not None
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._greet, args=(connection,), daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        with connection:
            hello = b""
            connection.settimeout(LOSS_SECONDS)
            with contextlib.suppress(OSError):
                hello = _line(connection)
            rank = next((rank for rank in range(1, self._nodes.count) if hello == _HELLO % rank), None)
            if rank is not None and rank not in self._connections:  # or it is somebody else
                self._watch(rank, connection)

    def _follow(self) -> None:
        while not self._closed:
            try:
                address = (self._nodes.master_addr, watch_port(self._nodes))
                connection = socket.create_connection(address, timeout=LOSS_SECONDS)
            except OSError:
                time.sleep(_RETRY_SECONDS)  # host 0 may start later
                continue
            with connection:
                self._watch(0, connection)
            return

    def _watch(self, rank: int, connection: socket.socket) -> None:
        self._connections[rank] = connection
        connection.settimeout(None)
        limit_silence(connection, LOSS_SECONDS)
        last_word, reason = b"", "the process that starts its ranks has ended"
        try:
            if rank == 0:
                connection.sendall(_HELLO % self._nodes.rank)
            last_word = _line(connection)
        except TimeoutError:
            reason = f"it has not been heard of for {LOSS_SECONDS} s"
        except OSError as error:
            reason = str(error.strerror)
        with self._lock:
            if self._closed:
                return
        if last_word == _FAREWELL:
            self._on_farewell()
        else:
            self._on_loss(f"host {rank} of {self._nodes.count} is gone: {reason}")


def _line(connection: socket.socket) -> bytes:
    """The next line, or what came of it before the other side closed; at most 32 bytes."""
    line = b""
    while not line.endswith(b"\n") and len(line) < 32 and (byte := connection.recv(1)):
        line += byte
    return line
