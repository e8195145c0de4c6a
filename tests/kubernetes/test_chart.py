"""The chart in a real kube-apiserver with RBAC: what it takes, and its CPU profile serving with pods that are watched.

What a cluster's other parts would do is done here: a pod for each workload, its service account's token, and its status
as its probes have it. `make test-kubernetes` runs this.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client
from kubernetes.dynamic import DynamicClient

from tests.deploy.chart import SETS, Object, find, objects_of
from tests.deploy.test_chart_manifests import pod_templates
from tests.e2e import hosts
from tests.e2e.container import why_not
from tests.e2e.kubelet import Cluster, Ended, Pod, Proxy
from tests.e2e.release import Release, Serving, cpu_profile, workloads
from tests.kubernetes.api_server import BINARIES, ApiServer, running_api_server

pytestmark = [
    pytest.mark.skipif(
        "TKNP_TEST_KUBERNETES" not in os.environ,
        reason=f"make test-kubernetes runs it; the API server is built once into {BINARIES}",
    ),
    pytest.mark.skipif(bool(reason := why_not()), reason=str(reason)),
]

NAMESPACE = "serving"  # as tests/deploy/chart.py renders
OLDER = {"policy/v1": "policy/v1beta1", "autoscaling/v2": "autoscaling/v2beta2"}
"""Versions that Kubernetes 1.20 does not know, and what it calls the same fields."""
CUSTOM = {"PodMonitor", "PrometheusRule", "ScaledObject", "HTTPRoute", "LeaderWorkerSet"}
ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"


@dataclass
class Installed(Release):
    """A release whose pods stand in the API server."""

    core: Any
    tokens: dict[str, str]  # by component, of those that get one
    _stopped: threading.Event = field(default_factory=threading.Event)

    def report(self) -> None:
        """Writes each pod's status when it changes, as the kubelet does, until `stop`."""
        told: dict[str, bool] = {}
        while not self._stopped.wait(0.1):
            for pod in self.pods.values():
                if told.get(pod.name) != pod.is_ready:
                    told[pod.name] = pod.is_ready
                    conditions = [{"type": "Ready", "status": str(pod.is_ready)}]
                    status = {"phase": "Running", "podIP": pod.host.address, "conditions": conditions}
                    with contextlib.suppress(client.ApiException):  # deleted meanwhile
                        self.core.patch_namespaced_pod_status(pod.name, NAMESPACE, {"status": status})

    def stop(self) -> None:
        self._stopped.set()

    def delete(self, component: str) -> Ended:
        pod = self.pods[component]
        self.core.delete_namespaced_pod(pod.name, NAMESPACE)
        ended = pod.terminate()
        self.core.delete_namespaced_pod(pod.name, NAMESPACE, grace_period_seconds=0)
        return ended


def create(api: DynamicClient, found: Object, **options: Any) -> None:
    """Raises ApiException if the API server does not take it."""
    version = OLDER.get(found["apiVersion"], found["apiVersion"])
    resource = api.resources.get(api_version=version, kind=found["kind"])
    namespace = found["metadata"].get("namespace", NAMESPACE)  # as Helm does for those that name none
    resource.create(body={**found, "apiVersion": version}, namespace=namespace, **options)


@pytest.fixture(scope="module")
def network() -> Iterator[list[hosts.Host]]:
    with hosts.hosts(4) as made:
        yield made


@pytest.fixture(scope="module")
def api_server(network: list[hosts.Host], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """Where pods reach it."""
    address = hosts.this_machine(network[0])
    with running_api_server(tmp_path_factory.mktemp("api-server"), address=address) as api_server:
        core: Any = client.CoreV1Api(api_server.client())
        for name in (NAMESPACE, "monitoring", "other"):
            core.create_namespace({"metadata": {"name": name}})
        yield api_server


@pytest.mark.parametrize("name", SETS)
def test_the_api_server_takes_the_manifests(name: str, api_server: ApiServer) -> None:
    """It checks more than schemas say: selectors against labels, names, references within a pod. Nothing is kept."""
    api = DynamicClient(api_server.client())
    for found in objects_of(name):
        for checked in (found, *pod_templates(found)):
            if checked["kind"] not in CUSTOM:
                create(api, {"metadata": {"name": "template"}, **checked}, dry_run="All")


def test_a_wrong_manifest_is_refused(api_server: ApiServer) -> None:
    deployment: Object = json.loads(json.dumps(find(objects_of("minimal"), "Deployment", "llm-tknp-router")))
    deployment["spec"]["template"]["spec"]["containers"][0]["volumeMounts"][0]["name"] = "elsewhere"
    with pytest.raises(client.ApiException, match="volumeMounts"):
        create(DynamicClient(api_server.client()), deployment, dry_run="All")


@pytest.fixture(scope="module")
def release(
    api_server: ApiServer, network: list[hosts.Host], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installed]:
    folder, objects = tmp_path_factory.mktemp("pods"), cpu_profile()
    hook = find(objects, "Pod", "llm-tknp-test")  # Helm makes it only when it is to test
    api = DynamicClient(api_server.client())
    core: Any = client.CoreV1Api(api_server.client())  # takes the dicts that its types do not know of
    for found in objects:
        if found is not hook:
            create(api, found)
    (port,) = find(objects, "Service", "llm-tknp-router")["spec"]["ports"]
    address = hosts.this_machine(network[0])
    env = {"KUBERNETES_SERVICE_HOST": address, "KUBERNETES_SERVICE_PORT": api_server.url.rpartition(":")[2]}
    cluster = Cluster(NAMESPACE, {"llm-tknp-router.serving.svc": address}, env)
    templates = {component: found["spec"]["template"] for component, found in workloads(objects).items()}
    with ExitStack() as undo:
        pods, tokens = {}, {}
        for (component, template), host in zip((templates | {"test": hook}).items(), network, strict=True):
            name = f"llm-tknp-{component}-0"
            metadata, spec = {**template["metadata"], "name": name}, {**template["spec"], "nodeName": "node"}
            core.create_namespaced_pod(NAMESPACE, {"metadata": metadata, "spec": spec})
            # With what the API server filled in.
            kept = json.loads(core.read_namespaced_pod(name, NAMESPACE, _preload_content=False).data)
            secrets = {}
            if kept["spec"]["automountServiceAccountToken"]:
                tokens[component] = issue_token(core, kept["spec"]["serviceAccountName"])
                secrets[ACCOUNT] = account_folder(folder / f"{component}-account", tokens[component], api_server)
            pods[component] = Pod(name, kept, host, cluster, folder, secrets)
            undo.callback(pods[component].remove)
        router = pods["router"]
        undo.callback(Proxy(address, port["port"], lambda: (router.host.address, router.port("http"))).close)
        release = Installed(pods, pods.pop("test"), f"http://{address}:{port['port']}", core, tokens)
        threading.Thread(target=release.report, daemon=True).start()
        undo.callback(release.stop)
        yield release


def issue_token(core: Any, account: str) -> str:
    """Signed by the API server."""
    request = {"spec": {"expirationSeconds": 3600, "audiences": ["https://test"]}}
    token: str = core.create_namespaced_service_account_token(account, NAMESPACE, request).status.token
    return token


def account_folder(folder: Path, token: str, api_server: ApiServer) -> Path:
    """What a pod sees at ACCOUNT."""
    folder.mkdir()
    for name, text in (("token", token), ("ca.crt", api_server.ca.read_text()), ("namespace", NAMESPACE)):
        (folder / name).write_text(text)
    return folder


def test_the_router_s_account_may_list_and_watch_its_pods_and_nothing_else(
    release: Installed, api_server: ApiServer
) -> None:
    assert set(release.tokens) == {"router"}
    core: Any = client.CoreV1Api(api_server.client(release.tokens["router"]))
    core.list_namespaced_pod(NAMESPACE)
    core.list_namespaced_pod(NAMESPACE, watch=True, timeout_seconds=1, _preload_content=False).data  # noqa: B018
    refused: dict[str, Callable[[], Any]] = {
        "one pod": lambda: core.read_namespaced_pod("llm-tknp-router-0", NAMESPACE),
        "its log": lambda: core.read_namespaced_pod_log("llm-tknp-router-0", NAMESPACE),
        "pods elsewhere": lambda: core.list_namespaced_pod("other"),
        "all pods": core.list_pod_for_all_namespaces,
        "secrets": lambda: core.list_namespaced_secret(NAMESPACE),
        "config maps": lambda: core.list_namespaced_config_map(NAMESPACE),
        "nodes": core.list_node,
        "deleting": lambda: core.delete_namespaced_pod("llm-tknp-router-0", NAMESPACE),
        "creating": lambda: core.create_namespaced_pod(
            NAMESPACE, {"metadata": {"name": "x"}, "spec": {"containers": []}}
        ),
        "status": lambda: core.patch_namespaced_pod_status("llm-tknp-router-0", NAMESPACE, {"status": {}}),
    }
    for what, call in refused.items():
        with pytest.raises(client.ApiException) as error:
            call()
        assert error.value.status == 403, what


class TestServing(Serving):
    """With engines that the router finds, and that leave through the API server."""
