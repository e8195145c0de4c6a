"""`tknp serve --ray` on a Ray cluster whose nodes are network namespaces with an address each."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.e2e import hosts
from tests.e2e.conftest import Expected
from tests.e2e.hosts import OVER_TCP, Host
from tests.e2e.processes import ENGINE_OPTIONS, START_SECONDS, Service, tknp, wait_for
from tests.e2e.suite import answers, around_boundaries, crowd
from tknp.common.ports import free_port

pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")
pytestmark = pytest.mark.skipif(bool(reason := hosts.why_not()), reason=str(reason))

RAY = [sys.executable, "-W", "ignore", "-m", "ray.scripts.scripts"]
GCS_PORT = 6379
NUM_GPUS = (1, 2)
"""Of the head and of the other node: room for a prefill engine and two ranks, which can't share a node."""


def environment(host: Host) -> dict[str, str]:
    return {**OVER_TCP, "RAY_ADDRESS": "", "RAY_USAGE_STATS_ENABLED": "0", "VLLM_HOST_IP": host.address}


def in_cluster(head: Host) -> dict[str, str]:
    return {"RAY_ADDRESS": f"{head.address}:{GCS_PORT}"}


def start_node(host: Host, head: Host, num_gpus: int, log_dir: Path) -> Service:
    """A Ray node; on a CPU, Ray's GPUs are places of engines and ranks."""
    role = (
        ["--head", f"--port={GCS_PORT}", "--include-dashboard=false", f"--temp-dir=/tmp/{head.name}"]
        if host is head
        else [f"--address={head.address}:{GCS_PORT}"]
    )
    size = [f"--num-gpus={num_gpus}", "--num-cpus=1", "--object-store-memory=80000000"]
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
    with hosts.hosts(len(NUM_GPUS)) as made, ExitStack() as undo:
        head = made[0]
        undo.callback(shutil.rmtree, f"/tmp/{head.name}", ignore_errors=True)
        for count, (host, num_gpus) in enumerate(zip(made, NUM_GPUS, strict=True), 1):
            undo.callback(start_node(host, head, num_gpus, log_dir).stop)
            wait_for_nodes(head, count)
        yield made


def start_serve(model: Path, head: Host, log_dir: Path) -> Service:
    port = free_port()
    words = ["serve", str(model), "--ray", "--host", head.address, "--port", str(port), "--log-dir", str(log_dir)]
    command = head.command(tknp(*words, "--token-parallel-size", "2", *ENGINE_OPTIONS))
    return Service("serve", command, log_dir, port, {**environment(head), **in_cluster(head)}, head.address)


def says(service: Service, text: str) -> None:
    """Returns once `service` has written `text`."""

    def written() -> bool:
        if text in service.log.read_text():
            return True
        if (code := service.process.poll()) is not None:
            raise RuntimeError(f"{service.name} ended with {code}, without saying {text!r}:\n{service.tail()}")
        return False

    wait_for(written, START_SECONDS, repr(text))


def free_gpus(head: Host) -> int:
    """What the cluster could give away now."""
    ask = "import ray; ray.init(log_to_driver=False); print(int(ray.available_resources().get('GPU', 0)))"
    command = head.command([sys.executable, "-W", "ignore", "-c", ask])
    done = subprocess.run(command, env={**os.environ, **environment(head), **in_cluster(head)}, capture_output=True)
    return int(done.stdout or -1)


def processes_on(host: Host) -> dict[str, str]:
    """Command lines by process."""
    pids = subprocess.run(["ip", "netns", "pids", host.name], capture_output=True, text=True, check=True).stdout
    found = {}
    for pid in pids.split():
        with suppress(OSError):  # it has ended meanwhile
            found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def left_on(host: Host) -> list[str]:
    """Command lines of engines and ranks that run there."""
    names = ("-m tknp ", "VLLM::", "ray::Ray", "ray::Engine")
    return [line for line in processes_on(host).values() if any(name in line for name in names)]


def wait_until_all_is_given_back(head: Host, other: Host) -> None:
    def is_given_back() -> bool:
        return not left_on(head) + left_on(other) and free_gpus(head) == sum(NUM_GPUS)

    try:
        wait_for(is_given_back, START_SECONDS, "everything being given back")
    except TimeoutError as error:
        left = [f"{host.name}: {line[:200]}" for host in (head, other) for line in left_on(host)]
        raise TimeoutError("\n".join([str(error), f"free GPUs: {free_gpus(head)} of {sum(NUM_GPUS)}", *left])) from None


@pytest.fixture(scope="module")
def model(models: Callable[[str], Path]) -> Path:
    return models("llama")


@pytest.fixture(scope="module")
def serve(model: Path, nodes: list[Host], log_dir: Path) -> Iterator[Service]:
    service = start_serve(model, nodes[0], log_dir)
    try:
        says(service, "until Ctrl-C")
        yield service
    finally:
        service.stop()


def test_a_start_that_is_interrupted_leaves_nothing(model: Path, nodes: list[Host], tmp_path: Path) -> None:
    head, other = nodes
    service = start_serve(model, head, tmp_path)
    wait_for(lambda: any("-m tknp prefill" in line for line in left_on(other)), START_SECONDS, "a start elsewhere")
    service.stop()
    assert service.process.returncode == 0
    wait_until_all_is_given_back(head, other)


def test_an_engine_ends_with_what_started_it(model: Path, nodes: list[Host], tmp_path: Path) -> None:
    head, other = nodes
    service = start_serve(model, head, tmp_path)
    wait_for(lambda: any("VLLM::EngineCore" in line for line in left_on(other)), START_SECONDS, "a start elsewhere")
    drivers = [int(pid) for pid, line in processes_on(head).items() if "tknp.launch.ray_engine" in line]
    for pid in drivers:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert drivers and service.process.wait(START_SECONDS) == 1
    wait_until_all_is_given_back(head, other)


def test_what_is_spread_over_nodes_gives_plain_vllm_s_tokens(
    serve: Service, nodes: list[Host], log_dir: Path, plain_llama: Expected
) -> None:
    head, other = nodes
    asks = [*around_boundaries(seed=1), *crowd(seed=2)]
    assert answers(serve, asks, at_once=16) == plain_llama(asks)
    assert f"prefill-0 at http://{other.address}:" in serve.log.read_text()
    assert f"decode-0 at http://{head.address}:" in serve.log.read_text()
    decode = (log_dir / "decode-0.log").read_text()
    found = [line.split()[-1] for line in decode.splitlines() if "is on Ray node" in line]
    assert len(set(found)) == len(found) == 2
    assert free_gpus(head) == 0
    ranks = next(engine["ranks"] for engine in serve.get("/status")["engines"] if engine["role"] == "decode")
    assert all(rank["kv_used"] == 0 for rank in ranks)


def test_the_loss_of_a_rank_ends_all_of_it(serve: Service, nodes: list[Host], log_dir: Path) -> None:
    head, other = nodes
    (pid,) = [int(pid) for pid, line in processes_on(other).items() if "ray::RayWorkerProc" in line]
    os.kill(pid, signal.SIGKILL)
    assert serve.process.wait(START_SECONDS) == 1
    assert "a rank's Ray actor has died" in (log_dir / "decode-0.log").read_text()
    assert "no decode engine is left" in serve.log.read_text()
    wait_until_all_is_given_back(head, other)
