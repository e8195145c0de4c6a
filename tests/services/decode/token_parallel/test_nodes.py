from __future__ import annotations

import os
import queue
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from services.decode.token_parallel import nodes
from services.decode.token_parallel.nodes import NodeWatch, prepare_network
from services.decode.token_parallel.options import Nodes, UnsupportedConfigurationError
from tests.e2e.processes import wait_for
from tknp.common.ports import is_free

News = queue.SimpleQueue[tuple[int, str]]
"""Host by host, what its watch tells: the reason of a loss, or "farewell"."""


@pytest.fixture
def news() -> News:
    return queue.SimpleQueue()


@pytest.fixture
def watch(news: News) -> Iterator[Callable[[int], NodeWatch]]:
    """Starts the watch of one host of three."""
    # Not one that the system gives to clients: those that wait for it could get it themselves.
    port = next(p for p in random.sample(range(20_000, 30_000), 100) if is_free("127.0.0.1", p + 1))
    with ExitStack() as undo:

        def start(rank: int) -> NodeWatch:
            made = NodeWatch(
                Nodes(3, rank, "127.0.0.1", port), lambda why: news.put((rank, why)), lambda: news.put((rank, "bye"))
            )
            undo.callback(made.close, orderly=True)
            return made

        yield start


def all_met(leader: NodeWatch) -> None:
    wait_for(lambda: sorted(leader._connections) == [1, 2], 10, "both hosts at host 0")


def test_the_others_wait_for_host_0_and_hear_its_farewell(watch: Callable[[int], NodeWatch], news: News) -> None:
    watch(1), watch(2)
    leader = watch(0)
    all_met(leader)
    leader.close(orderly=True)
    assert sorted(news.get(timeout=10) for _ in range(2)) == [(1, "bye"), (2, "bye")]
    assert news.empty()


@pytest.mark.parametrize("orderly", [True, False])
def test_host_0_hears_of_every_end_of_another(watch: Callable[[int], NodeWatch], news: News, orderly: bool) -> None:
    leader = watch(0)
    watch(1)
    other = watch(2)
    all_met(leader)
    other.close(orderly)
    assert news.get(timeout=10) == (0, "host 2 of 3 is gone: the process that starts its ranks has ended")


def test_the_others_hear_when_host_0_failed(watch: Callable[[int], NodeWatch], news: News) -> None:
    leader = watch(0)
    watch(1), watch(2)
    all_met(leader)
    leader.close(orderly=False)
    heard = [news.get(timeout=10) for _ in range(2)]
    assert sorted(rank for rank, _ in heard) == [1, 2]
    assert all("host 0 of 3 is gone" in why for _, why in heard)


def test_strangers_and_second_ones_of_a_name_are_sent_away(watch: Callable[[int], NodeWatch], news: News) -> None:
    leader = watch(0)
    watch(1), watch(2)
    all_met(leader)
    for hello in (b"GET / HTTP/1.1\r\n", b"tknp node 2\n", b"tknp node 7\n"):
        with socket.create_connection(("127.0.0.1", nodes.watch_port(leader._nodes)), timeout=10) as stranger:
            stranger.sendall(hello)
            assert stranger.recv(1) == b""
    assert news.empty()


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UnsupportedConfigurationError, match=f"port {port}, the one after --master-port"):
            NodeWatch(Nodes(2, 0, "127.0.0.1", port - 1), lambda _: None, lambda: None)


def test_an_address_that_only_this_host_reaches_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_HOST_IP", raising=False)
    with pytest.raises(UnsupportedConfigurationError, match=r"--master-addr is '127.0.0.1'.*can't reach"):
        prepare_network(Nodes(2, 0, "127.0.0.1"))


@pytest.mark.parametrize("given", [{}, {"GLOO_SOCKET_IFNAME": "bond7"}])
def test_the_interface_of_the_address_is_used_unless_one_is_named(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str]
) -> None:
    names: dict[str, list[Any]] = {"lo": ["127.0.0.1"], "ib3": ["10.9.8.7", "fe80::1"]}
    addresses = {name: [_Address(known) for known in own] for name, own in names.items()}
    monkeypatch.setattr("psutil.net_if_addrs", lambda: addresses)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that it is taken back whatever happens
        monkeypatch.delenv(name)
    for name, value in {"VLLM_HOST_IP": "10.9.8.7", **given}.items():
        monkeypatch.setenv(name, value)
    prepare_network(Nodes(2, 0, "10.9.8.1"))
    assert os.environ["GLOO_SOCKET_IFNAME"] == given.get("GLOO_SOCKET_IFNAME", "ib3")
    assert os.environ["NCCL_SOCKET_IFNAME"] == "ib3"


class _Address:
    def __init__(self, address: str) -> None:
        self.address = address
