"""The chart's CPU profile serves: what Helm renders runs here, container by container, as in a cluster.

The router gets the engines' names. tests/kubernetes/test_chart.py has them found through a real API server.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.deploy.chart import Object, find
from tests.e2e import hosts
from tests.e2e.container import why_not
from tests.e2e.kubelet import Cluster, Pod, Proxy
from tests.e2e.release import Release, Serving, cpu_profile, workloads

pytestmark = pytest.mark.skipif(bool(reason := why_not()), reason=str(reason))

COMPONENTS = ("prefill", "decode", "router", "test")


def dns(objects: list[Object], addresses: dict[str, str], cluster_ip: str) -> dict[str, str]:
    """What the cluster's DNS answers, by name."""
    names = {"llm-tknp-router.serving.svc": cluster_ip}
    for component, workload in workloads(objects).items():
        if workload["kind"] == "StatefulSet":
            headless = find(objects, "Service", workload["spec"]["serviceName"])
            assert headless["spec"]["clusterIP"] == "None"
            pod = f"{workload['metadata']['name']}-0"
            names[f"{pod}.{headless['metadata']['name']}.serving.svc"] = addresses[component]
    return names


@pytest.fixture(scope="module")
def release(log_dir: Path) -> Iterator[Release]:
    objects = cpu_profile(discovery={"mode": "static"})
    (port,) = find(objects, "Service", "llm-tknp-router")["spec"]["ports"]
    with ExitStack() as undo:
        made = dict(zip(COMPONENTS, undo.enter_context(hosts.hosts(len(COMPONENTS))), strict=True))
        cluster_ip = hosts.this_machine(made["router"])
        cluster = Cluster("serving", dns(objects, {name: host.address for name, host in made.items()}, cluster_ip))
        templates = {component: found["spec"]["template"] for component, found in workloads(objects).items()}
        templates["test"] = find(objects, "Pod", "llm-tknp-test")
        pods = {}
        for component, template in templates.items():
            pods[component] = Pod(f"llm-tknp-{component}-0", template, made[component], cluster, log_dir)
            undo.callback(pods[component].remove)
        router = pods["router"]
        undo.callback(Proxy(cluster_ip, port["port"], lambda: (router.host.address, router.port("http"))).close)
        yield Release(pods, pods.pop("test"), f"http://{cluster_ip}:{port['port']}")


class TestServing(Serving):
    pass
