"""Discovery against a real kube-apiserver with etcd: `make test-kubernetes`. CI replays a recording of one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from router.types import Role
from tests.kubernetes.api_server import BINARIES, NAMESPACE, ApiServer, Cluster, running_api_server
from tests.router.running import RunningRouter, running_router, wait_for
from tests.router.scripted_engine import ScriptedEngine, answer_either, chunk, engine_loop, raw_stream

pytestmark = pytest.mark.skipif(
    "TKNP_TEST_KUBERNETES" not in os.environ,
    reason=f"make test-kubernetes runs it; the API server is built once into {BINARIES}",
)


@dataclass
class Setup:
    api_server: ApiServer
    cluster: Cluster
    router: RunningRouter
    engines: dict[str, ScriptedEngine]

    def start(self, name: str, role: str) -> None:
        self.cluster.create(name, role, self.engines[name].port)
        self.cluster.set_ready(name)

    def roles(self) -> dict[str, str]:
        names = {engine.url: name for name, engine in self.engines.items()}
        found = self.router.state.pool.engines
        return {names[e.endpoint.url]: e.endpoint.role.value for e in found if e.is_up and not e.is_draining}

    def wait_for(self, **roles: str) -> float:
        """Seconds that it took."""
        begin = time.monotonic()
        wait_for(lambda: self.roles() == roles)
        return time.monotonic() - begin


@pytest.fixture(params=["watch cache", "no watch cache"])
def setup(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Setup]:
    has_cache = request.param == "watch cache"
    with engine_loop() as loop, running_api_server(tmp_path, watch_cache=has_cache) as api_server:
        engines = {name: ScriptedEngine(loop, Role.DECODE) for name in "abc"}
        for engine in engines.values():
            engine.behaviour = answer_either
            engine.revive()
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        monkeypatch.setenv("KUBECONFIG", str(api_server.kubeconfig()))
        monkeypatch.setattr("router.pod_watch.BASE_PAUSE", 0.05)
        monkeypatch.setattr("router.pod_watch.WATCH_SECONDS", 2)  # so that many calls follow one another
        cluster = Cluster(api_server)
        cluster.prepare()
        selectors: dict[str, Any] = {
            f"kubernetes_selector_{role}": f"app=tknp,role={role}" for role in ("prefill", "decode")
        }
        with running_router([], discovery="kubernetes", kubernetes_namespace=NAMESPACE, **selectors) as router:
            yield Setup(api_server, cluster, router, engines)
        for engine in engines.values():
            engine.kill()


def test_engines_join_leave_and_change_role(setup: Setup) -> None:
    cluster = setup.cluster
    took = {}
    setup.start("a", "prefill")
    setup.start("b", "decode")
    setup.wait_for(a="prefill", b="decode")
    assert setup.router.complete().status == 200
    setup.start("c", "decode")
    took["join"] = setup.wait_for(a="prefill", b="decode", c="decode")
    cluster.set_ready("c", False)
    took["not ready"] = setup.wait_for(a="prefill", b="decode")
    cluster.set_ready("c")
    setup.wait_for(a="prefill", b="decode", c="decode")
    for name in "bc":
        setup.engines[name].behaviour = raw_stream(*map(chunk, range(5)), b"data: [DONE]\n\n", then="end", pause=0.2)
    streams = [setup.router.open_stream() for _ in range(4)]
    wait_for(lambda: setup.engines["b"].seen and setup.engines["c"].seen)
    cluster.relabel("c", "prefill")
    cluster.delete("b")
    took["terminating"] = setup.wait_for(a="prefill")
    for raw in streams:
        got = b""
        while b"[DONE]" not in got:
            got += raw.recv(4096)
        assert chunk(4) in got
        raw.close()
    took["role"] = setup.wait_for(a="prefill", c="prefill")
    cluster.bury("b")
    cluster.delete("a")
    setup.wait_for(c="prefill")
    print("noticed after", {name: f"{seconds * 1000:.0f} ms" for name, seconds in took.items()})
    assert max(took.values()) < 5


def test_a_watch_from_a_version_that_the_api_server_forgot(setup: Setup) -> None:
    """etcd is compacted while watches end every second: 410 Gone, and no change is lost."""
    setup.start("a", "prefill")
    setup.start("b", "decode")
    setup.wait_for(a="prefill", b="decode")
    for _ in range(5):
        setup.cluster.set_ready("b", False)
        setup.cluster.set_ready("b", True)
    setup.api_server.forget_history()
    if not setup.api_server.has_watch_cache:  # which would remember for itself
        wait_for(lambda: setup.router.metric("tknp_discovery_faults_total", fault="expired") > 0)
    setup.start("c", "decode")
    setup.cluster.delete("a")
    setup.wait_for(b="decode", c="decode")
    setup.cluster.set_ready("c", False)
    setup.wait_for(b="decode")


def test_the_role_is_enough_and_no_more(setup: Setup) -> None:
    """The rights that docs/discovery.md asks for."""
    from kubernetes import client

    core = client.CoreV1Api(setup.api_server.client("router-token"))
    core.list_namespaced_pod(NAMESPACE)
    for refused in (
        lambda: core.list_pod_for_all_namespaces(),
        lambda: core.list_namespaced_secret(NAMESPACE),
        lambda: core.read_namespaced_pod("a", NAMESPACE),
        lambda: core.delete_namespaced_pod("a", NAMESPACE),
    ):
        with pytest.raises(client.ApiException) as error:
            refused()
        assert error.value.status == 403
