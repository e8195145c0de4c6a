"""Several hosts on one machine: network namespaces with an address each, joined by a bridge."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

OVER_TCP = {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "eth0"}
"""Hosts made of namespaces share the machine's memory, which UCX would find and use."""


def run_ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def why_not() -> str | None:
    """What this machine lacks for making hosts; None if nothing."""
    if os.geteuid() != 0:
        return "network namespaces take root"
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "network namespaces take iproute2's ip and tc"
    try:
        with hosts(1):
            return None
    except OSError as error:
        return f"this machine makes no network namespaces ({error})"


@dataclass(frozen=True)
class Host:
    """One network namespace, with `eth0` at `address`; the tests themselves are one more host on the bridge."""

    name: str
    index: int
    address: str

    @property
    def outside(self) -> str:
        """The other end of its cable, on this machine."""
        return self.name.replace("-", "-v")

    @property
    def mac(self) -> str:
        return f"02:00:00:00:00:{self.index:02x}"

    def command(self, words: Sequence[str]) -> list[str]:
        """`words`, run on this host."""
        return ["ip", "netns", "exec", self.name, *words]

    def ip(self, *words: str) -> None:
        run_ip("-netns", self.name, *words)

    @contextmanager
    def rate(self, rate: str) -> Iterator[None]:
        """Limits what leaves this host meanwhile, to `1mbit` for example."""
        with self._leaving("tbf", "rate", rate, "burst", "32kbit", "latency", "10s"):
            yield

    @contextmanager
    def lossy(self, rate: str) -> Iterator[None]:
        """As `rate`, with room for eight packets to wait; the others are lost, one of five in a long transfer."""
        with self._leaving("tbf", "rate", rate, "burst", "6kb", "limit", "12kb"):
            yield

    def lost_packets(self) -> int:
        """Of what was to leave this host while it was limited as it is now."""
        show = ["tc", "-netns", self.name, "-json", "-statistics", "qdisc", "show", "dev", "eth0", "root"]
        (found,) = json.loads(subprocess.run(show, check=True, capture_output=True, text=True).stdout)
        return int(found["drops"])

    @contextmanager
    def _leaving(self, *discipline: str) -> Iterator[None]:
        where = ["dev", "eth0", "root"]
        self._qdisc("add", *where, *discipline)
        try:
            yield
        finally:
            self._qdisc("del", *where)

    def _qdisc(self, *words: str) -> None:
        done = subprocess.run(["tc", "-netns", self.name, "qdisc", *words], capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"tc qdisc {' '.join(words)}: {done.stderr.strip()}")


def this_machine(host: Host) -> str:
    """Where the hosts beside `host`, and itself, reach the machine that they are made on."""
    return f"{host.address.rpartition('.')[0]}.254"


@dataclass(frozen=True)
class Link:
    """What two hosts say to each other. Cut, it loses every packet without a word, as a broken switch does."""

    a: Host
    b: Host

    def cut(self) -> None:
        self._send_to("02:00:00:00:00:fe", "02:00:00:00:00:fe")  # nobody's

    def mend(self) -> None:
        self._send_to(self.a.mac, self.b.mac)

    def _send_to(self, mac_of_a: str, mac_of_b: str) -> None:
        for host, other, mac in ((self.a, self.b, mac_of_b), (self.b, self.a, mac_of_a)):
            host.ip("neigh", "replace", other.address, "lladdr", mac, "nud", "permanent", "dev", "eth0")


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Makes `count` hosts; the machine itself reaches them at their addresses. They are gone in the end.

    Raises:
        OSError: the machine allows no such thing.
    """
    tag = f"{os.getpid() % 0xFFFF:04x}"
    subnet = f"198.{18 + os.getpid() % 2}.{os.getpid() // 2 % 250}"  # set aside for tests of networks (RFC 2544)
    bridge = f"tknp{tag}"
    with ExitStack() as undo:
        run_ip("link", "add", bridge, "type", "bridge")
        undo.callback(run_ip, "link", "del", bridge)
        run_ip("addr", "add", f"{subnet}.254/24", "dev", bridge)
        run_ip("link", "set", bridge, "up")
        made = [Host(f"{bridge}-{i}", i, f"{subnet}.{i}") for i in range(1, count + 1)]
        for host in made:
            run_ip("netns", "add", host.name)
            undo.callback(run_ip, "netns", "del", host.name)
            run_ip("link", "add", host.outside, "type", "veth", "peer", "name", "eth0", "netns", host.name)
            undo.callback(run_ip, "link", "del", host.outside)
            run_ip("link", "set", host.outside, "master", bridge, "up")
            host.ip("link", "set", "lo", "up")
            host.ip("link", "set", "eth0", "address", host.mac, "up")
            host.ip("addr", "add", f"{host.address}/24", "dev", "eth0")
        yield made
