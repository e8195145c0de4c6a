"""One deployment over several hosts, started by the SLURM scripts: a KV worker and a prefill engine at other addresses
than the root."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e import hosts
from tests.e2e.conftest import Expected
from tests.e2e.expected import llama, long_answers, long_streams
from tests.e2e.hosts import Host, Link
from tests.e2e.processes import ENGINE_OPTIONS, wait_for
from tests.e2e.slurm import start_job
from tests.e2e.stack import Stack
from tests.e2e.suite import answers, around_boundaries, crowd

pytestmark = pytest.mark.skipif(bool(reason := hosts.why_not()), reason=str(reason))

LIMIT = 60.0
"""Seconds until a request that lost its link has an answer or an error."""


@dataclass
class Deployment(Stack):
    root: Host
    kv: Host
    prefilling: Host


def received(host: Host) -> int:
    """Bytes that came in at a host."""
    return int(Path(f"/sys/class/net/{host.outside}/statistics/tx_bytes").read_text())


@pytest.fixture(scope="module")
def deployment(models: Callable[[str], Path], log_dir: Path) -> Iterator[Deployment]:
    with hosts.hosts(3) as (root, kv, prefilling):
        words = (str(models("llama")), *ENGINE_OPTIONS)
        decode = start_job("decode", "decode.sbatch", [root, kv], log_dir, *words, "--token-parallel-size", "2")
        prefill = start_job("prefill", "prefill.sbatch", [prefilling], log_dir, *words)
        router = start_job("router", "router.sbatch", [], log_dir)
        try:
            for engine in (prefill, decode):
                engine.wait_ready()
            router.wait_whole()
            yield Deployment(prefill, decode, router, root, kv, prefilling)
        finally:
            for service in (router, decode, prefill):
                service.stop()


def test_the_tokens_are_plain_vllm_s(deployment: Deployment, plain_llama: Expected) -> None:
    asks = [*around_boundaries(seed=1), *crowd(seed=2)]
    before = received(deployment.kv)
    assert answers(deployment.router, asks, at_once=16) == plain_llama(asks)
    deployment.wait_idle()
    pulled = deployment.decode.metric("tknp_kv_transfer_bytes_total", rank="1")
    assert pulled > 0
    # Straight to the host that owns it, over the network.
    assert received(deployment.kv) - before > pulled


def test_a_link_cut_in_the_middle_of_a_pull_costs_a_prefill(deployment: Deployment, plain_llama: Expected) -> None:
    asks = [ask for ask in llama() if len(ask.body.get("prompt", ())) > 250]
    link = Link(deployment.prefilling, deployment.kv)
    before = received(deployment.kv)
    with ThreadPoolExecutor() as pool:
        with deployment.prefilling.rate("2mbit"):
            asked = pool.submit(answers, deployment.router, asks, at_once=len(asks))
            wait_for(lambda: received(deployment.kv) > before + 200_000, LIMIT, "the middle of a pull")
            link.cut()
            began = time.monotonic()
        try:
            got = asked.result(LIMIT)
            print(f"answers after {time.monotonic() - began:.1f} s")
            assert got == plain_llama(asks)
            deployment.wait_idle()
            print(f"idle after {time.monotonic() - began:.1f} s")
        finally:
            link.mend()
    # The connection is made anew, for prompts that are cached nowhere.
    pulled = deployment.decode.metric("tknp_kv_transfer_bytes_total", rank="1")
    assert answers(deployment.router, long_answers(), at_once=9) == plain_llama(long_answers())
    assert deployment.decode.metric("tknp_kv_transfer_bytes_total", rank="1") > pulled


def test_an_engine_that_lost_a_host_ends_and_its_requests_with_it(deployment: Deployment) -> None:
    link = Link(deployment.root, deployment.kv)
    ask = long_streams()[0]
    with ThreadPoolExecutor() as pool:
        replies = [pool.submit(deployment.router.post, ask.path, ask.body) for _ in range(4)]
        wait_for(lambda: sum(r["num_requests"] for r in deployment.ranks()) == 4, LIMIT, "four requests")
        link.cut()
        began = time.monotonic()
        assert {reply.result(LIMIT).status_code for reply in replies} == {502}
        print(f"errors after {time.monotonic() - began:.1f} s")
    assert deployment.decode.process.wait(LIMIT) == 1
    print(f"ended after {time.monotonic() - began:.1f} s")
    for other in (0, 1):  # each host by itself
        assert f"host {other} of 2 is gone: it has not been heard of for 10 s" in deployment.decode.log.read_text()
    wait_for(lambda: deployment.prefill.metric("vllm:kv_cache_usage_perc") == 0, LIMIT, "the prefill pool being whole")
