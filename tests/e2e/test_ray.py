"""`tknp serve --ray`: a prefill engine and token-parallel ranks on the nodes of a Ray cluster, which are namespaces."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.vllm_server import free_port
from tests.e2e import hosts
from tests.e2e.conftest import Expected
from tests.e2e.hosts import OVER_TCP, Host
from tests.e2e.processes import ENGINE_OPTIONS, START_SECONDS, Server, Service, tknp, wait_for
from tests.e2e.suite import answers, around_boundaries, crowd

pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")
pytestmark = pytest.mark.skipif(bool(reason := hosts.why_not()), reason=str(reason))

RAY = [sys.executable, "-W", "ignore", "-m", "ray.scripts.scripts"]
GCS_PORT = 6379
ENVIRONMENT = {**OVER_TCP, "RAY_ADDRESS": "", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_DOCKER_CPU_WARNING": "1"}


def start_node(host: Host, head: Host, log_dir: Path) -> Service:
    """A Ray node with room for one rank; on a CPU, places of ranks are Ray's GPUs."""
    role = (
        ["--head", f"--port={GCS_PORT}", "--include-dashboard=false", f"--temp-dir=/tmp/{head.name}"]
        if host is head
        else [f"--address={head.address}:{GCS_PORT}"]
    )
    size = ["--num-gpus=1", "--num-cpus=1", "--object-store-memory=80000000"]
    environment = {**ENVIRONMENT, "VLLM_HOST_IP": host.address}
    command = host.command([*RAY, "start", "--block", f"--node-ip-address={host.address}", *role, *size])
    return Service(f"ray-{host.index}", command, log_dir, GCS_PORT, environment, host.address)


def num_nodes(head: Host) -> int:
    status = [*RAY, "status", f"--address={head.address}:{GCS_PORT}"]
    done = subprocess.run(head.command(status), capture_output=True, text=True)
    return done.stdout.count("1 node_")


@dataclass
class Cluster:
    """`tknp serve --ray` on the head of three nodes with room for one rank each."""

    serve: Service
    decode: Server
    decode_log: Path


@pytest.fixture(scope="module")
def cluster(models: Callable[[str], Path], log_dir: Path) -> Iterator[Cluster]:
    with hosts.hosts(3) as (head, *others), ExitStack() as undo:
        undo.callback(shutil.rmtree, f"/tmp/{head.name}", ignore_errors=True)
        undo.callback(start_node(head, head, log_dir).stop)
        wait_for(lambda: num_nodes(head) == 1, START_SECONDS, "the head of the Ray cluster")
        for host in others:
            undo.callback(start_node(host, head, log_dir).stop)
        wait_for(lambda: num_nodes(head) == 3, START_SECONDS, "three Ray nodes")
        port = free_port()
        words = ["serve", str(models("llama")), "--ray", "--host", head.address, "--port", str(port)]
        environment = {**ENVIRONMENT, "RAY_ADDRESS": f"{head.address}:{GCS_PORT}"}
        command = head.command(tknp(*words, "--log-dir", str(log_dir), *ENGINE_OPTIONS))
        serve = Service("serve", command, log_dir, port, environment, head.address)
        undo.callback(serve.stop)
        wait_for(
            lambda: "until Ctrl-C" in serve.log.read_text() or serve.process.poll() is not None,
            START_SECONDS,
            "`tknp serve` serving",
        )
        assert serve.process.poll() is None, serve.tail()
        found = re.search(r"decode-0 at ([^,]+),", serve.log.read_text())
        assert found is not None
        yield Cluster(serve, Server(found.group(1)), log_dir / "decode-0.log")


def test_ranks_on_two_ray_nodes_give_plain_vllm_s_tokens(cluster: Cluster, plain_llama: Expected) -> None:
    asks = [*around_boundaries(seed=1), *crowd(seed=2)]
    assert answers(cluster.serve, asks, at_once=16) == plain_llama(asks)
    nodes = [line.split()[-1] for line in cluster.decode_log.read_text().splitlines() if "is on Ray node" in line]
    assert len(set(nodes)) == len(nodes) == 2
    assert cluster.decode.metric("tknp_kv_transfer_bytes_total", rank="1") > 0


def test_an_engine_that_lost_a_rank_s_actor_ends(cluster: Cluster) -> None:
    pids = [rank["pid"] for rank in cluster.decode.get("/token_parallel")["ranks"]]
    subprocess.run(["kill", "-9", str(pids[1])], check=True)
    assert cluster.serve.process.wait(START_SECONDS) == 1
    assert "a rank's Ray actor has died" in cluster.decode_log.read_text()
    assert "no decode engine is left" in cluster.serve.log.read_text()
