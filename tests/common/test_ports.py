from __future__ import annotations

import socket
import threading

import pytest

from tknp.common.ports import PortError, choose_ports, free_port, is_free, wait_until_free


def test_a_port_that_someone_listens_on_is_not_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not is_free("127.0.0.1", port)
        assert not is_free("0.0.0.0", port)
    assert is_free("127.0.0.1", port)


def test_ports_are_different_and_free() -> None:
    ports = choose_ports(20)
    assert len(set(ports)) == 20
    assert all(is_free("127.0.0.1", port) for port in ports)


def test_ports_stay_out_of_the_range_of_outgoing_connections() -> None:
    assert all(1024 < port < 32_768 for port in [*choose_ports(20), free_port()])


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host"])
def test_an_address_of_another_machine_is_refused(host: str) -> None:
    with pytest.raises(PortError, match="is no address of this machine"):
        is_free(host, 8000)


def test_a_port_that_is_still_taken_is_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        threading.Timer(0.3, server.close).start()
        wait_until_free("127.0.0.1", port, patience=30)
    assert is_free("127.0.0.1", port)


def test_a_port_that_stays_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(PortError, match=rf"^port {port} of 127\.0\.0\.1 is in use, and still was after 0\.2 s$"):
            wait_until_free("127.0.0.1", port, patience=0.2)
