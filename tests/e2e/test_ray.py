"""Token-parallel ranks, and prefill engines of `tknp serve --ray`, on a Ray cluster whose nodes are namespaces."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from services.vllm_server import free_port
from tests.e2e import hosts
from tests.e2e.conftest import Expected
from tests.e2e.hosts import OVER_TCP, Host
from tests.e2e.processes import ENGINE_OPTIONS, START_SECONDS, Service, tknp, wait_for
from tests.e2e.suite import answers, around_boundaries, crowd

pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")
pytestmark = pytest.mark.skipif(bool(reason := hosts.why_not()), reason=str(reason))

RAY = [sys.executable, "-W", "ignore", "-m", "ray.scripts.scripts"]
GCS_PORT = 6379


def environment(host: Host) -> dict[str, str]:
    return {**OVER_TCP, "RAY_ADDRESS": "", "RAY_USAGE_STATS_ENABLED": "0", "VLLM_HOST_IP": host.address}


def in_cluster(head: Host) -> dict[str, str]:
    return {"RAY_ADDRESS": f"{head.address}:{GCS_PORT}"}


def start_node(host: Host, head: Host, log_dir: Path) -> Service:
    """A Ray node with room for one rank; on a CPU, places of ranks are Ray's GPUs."""
    role = (
        ["--head", f"--port={GCS_PORT}", "--include-dashboard=false", f"--temp-dir=/tmp/{head.name}"]
        if host is head
        else [f"--address={head.address}:{GCS_PORT}"]
    )
    size = ["--num-gpus=1", "--num-cpus=1", "--object-store-memory=80000000"]
    command = host.command([*RAY, "start", "--block", f"--node-ip-address={host.address}", *role, *size])
    return Service(f"ray-{host.index}", command, log_dir, GCS_PORT, environment(host), host.address)


def wait_for_nodes(head: Host, count: int) -> None:
    status = head.command([*RAY, "status", f"--address={head.address}:{GCS_PORT}"])

    def joined() -> bool:
        return subprocess.run(status, capture_output=True, text=True).stdout.count("1 node_") == count

    wait_for(joined, START_SECONDS, f"a cluster of {count} Ray nodes")


@pytest.fixture(scope="module")
def nodes(log_dir: Path) -> Iterator[list[Host]]:
    """A cluster of two nodes, the head first."""
    with hosts.hosts(2) as (head, other), ExitStack() as undo:
        undo.callback(shutil.rmtree, f"/tmp/{head.name}", ignore_errors=True)
        for count, host in enumerate((head, other), 1):
            undo.callback(start_node(host, head, log_dir).stop)
            wait_for_nodes(head, count)
        yield [head, other]


@pytest.fixture(scope="module")
def decode(models: Callable[[str], Path], nodes: list[Host], log_dir: Path) -> Iterator[Service]:
    head = nodes[0]
    port = free_port()
    words = ["decode", str(models("llama")), "--host", head.address, "--port", str(port)]
    ranks = ["--token-parallel-size", "2", "--distributed-executor-backend", "ray"]
    command = head.command(tknp(*words, *ranks, *ENGINE_OPTIONS))
    engine = Service("decode", command, log_dir, port, {**environment(head), **in_cluster(head)}, head.address)
    try:
        engine.wait_ready()
        yield engine
    finally:
        engine.stop()


def test_ranks_on_two_ray_nodes_give_plain_vllm_s_tokens(decode: Service, plain_llama: Expected) -> None:
    asks = [*around_boundaries(seed=1), *crowd(seed=2)]
    assert answers(decode, asks, at_once=16) == plain_llama(asks)
    found = [line.split()[-1] for line in decode.log.read_text().splitlines() if "is on Ray node" in line]
    assert len(set(found)) == len(found) == 2
    assert all(rank["num_free_blocks"] == rank["num_blocks"] for rank in decode.get("/token_parallel")["ranks"])


def test_an_engine_that_lost_a_rank_s_actor_ends(decode: Service) -> None:
    pids = [rank["pid"] for rank in decode.get("/token_parallel")["ranks"]]
    subprocess.run(["kill", "-9", str(pids[1])], check=True)
    assert decode.process.wait(START_SECONDS) == 1
    assert "a rank's Ray actor has died" in decode.log.read_text()


PLACE_AND_RUN = """
import os, subprocess, sys
from tknp.launch.ray_places import ray_places

prefill, decode = ray_places([1], [1], "tknp-test")
assert decode.launcher == (sys.executable,)
words = ["-c", "import os; print('it ran at', os.environ['VLLM_HOST_IP']); raise SystemExit(7)"]
print(prefill.address, decode.address, flush=True)
sys.exit(subprocess.run([*prefill.launcher, *words], env={**os.environ, **prefill.environment}).returncode)
"""


def test_an_engine_of_tknp_serve_runs_where_ray_has_room_for_it(nodes: list[Host]) -> None:
    head = nodes[0]
    ended = subprocess.run(
        head.command([sys.executable, "-W", "ignore", "-c", PLACE_AND_RUN]),
        env={**os.environ, **environment(head), **in_cluster(head)},
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )
    assert ended.returncode == 7, ended.stderr
    chosen, here = ended.stdout.splitlines()[0].split()
    assert chosen in [host.address for host in nodes]
    assert here == head.address
    assert f"it ran at {chosen}" in ended.stdout + ended.stderr
