from __future__ import annotations

import os
import socket

from tknp.common.silence import SilenceLimit


def user_timeout(connection: socket.socket) -> int:
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)


def test_every_connection_of_the_process_is_limited_and_nothing_else_touched() -> None:
    read, write = os.pipe()
    here, there = socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
        SilenceLimit(20).apply()
        assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
        assert user_timeout(client) == user_timeout(server) == 20_000
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        os.write(write, b"a")
        here.sendall(b"b")
        assert (os.read(read, 1), there.recv(1)) == (b"a", b"b")
    for end in (here, there):
        end.close()
    for number in (read, write):
        os.close(number)


def test_new_connections_are_found_at_most_once_a_second() -> None:
    limit = SilenceLimit(20)
    limit.apply()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        limit.apply()
        assert user_timeout(client) == 0
        limit._applied -= 1.0
        limit.apply()
        assert user_timeout(client) == 20_000
        number = client.fileno()
        client.close()
        with socket.create_connection(server.getsockname()) as other:
            assert other.fileno() == number
            limit._applied -= 1.0
            limit.apply()
            assert user_timeout(other) == 20_000
            other.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0)
            limit._applied -= 1.0
            limit.apply()
            assert user_timeout(other) == 0, "it is known, and not looked at again"
