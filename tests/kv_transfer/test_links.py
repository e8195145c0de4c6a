"""Hand-overs between hosts (tests/e2e/hosts.py), by real NIXL over TCP, whose link is worse than it should be."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import hosts
from tests.e2e.hosts import Host
from tests.kv_transfer.far import FarEngine
from tests.kv_transfer.pair import prompt

pytestmark = pytest.mark.skipif(bool(reason := hosts.why_not()), reason=str(reason))

LEASE_SECONDS = 3
TOKENS = 500
"""Of a prompt: 1 MiB of KV cache."""


class Link:
    """Between a prefill engine and a decode engine with two ranks on another host."""

    def __init__(self, prefilling: Host, prefill: FarEngine, decode: FarEngine, seed: int) -> None:
        """`seed`: of the prompts."""
        self.prefilling = prefilling
        self.prefill = prefill
        self.decode = decode
        self._seeds = itertools.count(seed)

    def offer(self) -> tuple[list[int], Any]:
        """A new prompt, and the prefill engine's answer."""
        seed = next(self._seeds)
        tokens = prompt(TOKENS, seed)
        self.prefill.add(f"p{seed}", tokens, 1, {"do_remote_decode": True, "do_remote_prefill": False})
        return tokens, self.prefill.wait_for(f"p{seed}")

    def hand_over(self, count: int) -> list[int]:
        """So many at once, to their end. Returns how many tokens of each prompt the decode engine computed."""
        names = [f"d{next(self._seeds)}" for _ in range(count)]
        for name in names:
            tokens, params = self.offer()
            self.decode.add(name, tokens, 2, params)
        for name in names:
            self.decode.wait_for(name)
        computed = self.decode.status()["computed"]
        return [computed[name] - 1 for name in names]

    def settle(self) -> dict[str, Any]:
        """Waits until nothing is held on either side; the decode engine's statistics."""
        self.prefill.wait_idle()
        stats: dict[str, Any] = self.decode.wait_idle()["stats"]
        return stats


@pytest.fixture(scope="module")
def links(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Link, Link]]:
    """Two decode engines on one host. The second believes that leases are long: no heartbeat of it comes before they
    have ended."""
    logs = tmp_path_factory.mktemp("links")
    with ExitStack() as undo:
        prefilling, decoding = undo.enter_context(hosts.hosts(2))

        def start(host: Host, role: str, num_blocks: list[int], lease: int) -> FarEngine:
            log = logs / f"{role}-{lease}.log"
            engine = FarEngine(host, llama, role, num_blocks, log, kv_lease_duration=lease)
            undo.callback(engine.stop)
            return engine

        prefill = start(prefilling, "kv_producer", [150], LEASE_SECONDS)
        decode = [start(decoding, "kv_consumer", [80, 80], lease) for lease in (LEASE_SECONDS, 600)]
        for engine in (prefill, *decode):
            engine.status()  # it has started
        yield Link(prefilling, prefill, decode[0], seed=1), Link(prefilling, prefill, decode[1], seed=1000)


def test_kv_arrives_over_a_link_that_loses_packets_or_is_slow(links: tuple[Link, Link]) -> None:
    link, _ = links
    assert link.hand_over(2) == [1, 1]
    with link.prefilling.lossy("20mbit"):
        assert link.hand_over(4) == [1] * 4, "the last token alone"
        assert link.prefilling.lost_packets() > 100
    with link.prefilling.rate("2mbit"):
        assert link.hand_over(1) == [1]
    stats = link.settle()
    assert max(stats["pull_seconds"]) > LEASE_SECONDS, "heartbeats have renewed the lease"
    assert stats["stale_reason"] == stats["failure_rank"] == []


def test_a_lease_that_ends_while_its_kv_crosses_a_slow_link_costs_a_prefill(links: tuple[Link, Link]) -> None:
    _, link = links
    assert link.hand_over(2) == [1, 1]
    with link.prefilling.rate("2mbit"):
        assert link.hand_over(1) == [TOKENS]
    assert link.settle()["stale_reason"] == ["lease_ended"]
    assert link.hand_over(1) == [1], "the next one is pulled"
    link.settle()
