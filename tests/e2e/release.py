"""A release of the chart's CPU profile whose pods run on this machine, and what must hold of one."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import requests

from tests.deploy.chart import Object, render, values_of
from tests.e2e.kubelet import Ended, Pod
from tests.e2e.processes import START_SECONDS, wait_for


@dataclass
class Release:
    """What `helm install` makes, running."""

    pods: dict[str, Pod]  # by component
    test: Pod  # of `helm test`
    service: str  # URL of the router's service

    def ask(self, **fields: Any) -> requests.Response:
        body = {"model": "tiny", "prompt": "The capital of France is", "ignore_eos": True, **fields}
        return requests.post(f"{self.service}/v1/completions", json=body, timeout=60, stream=True)

    def logs(self) -> str:
        return "\n".join(pod.log() for pod in self.pods.values())

    def is_ready(self) -> bool:
        assert not any(pod.fault for pod in self.pods.values()), self.logs()
        return all(pod.is_ready for pod in self.pods.values())

    def delete(self, component: str) -> Ended:
        """As `kubectl delete pod`; returns when it has gone."""
        return self.pods[component].terminate()


def cpu_profile(**values: Any) -> list[Object]:
    """The objects of the CPU profile, whose pods drain for a short while only; `values` by their first key."""
    quick = {"engines": {"preStopSeconds": 2}, "router": {"drainSeconds": 3}}
    given = values_of("values-cpu")
    return render(given | {key: given.get(key, {}) | quick[key] for key in quick} | values)


def workloads(objects: list[Object]) -> dict[str, Object]:
    """By component."""
    kinds = ("Deployment", "StatefulSet")
    return {o["metadata"]["labels"]["app.kubernetes.io/component"]: o for o in objects if o["kind"] in kinds}


class Serving:
    """The tests of any release, in this order."""

    def test_it_gets_ready_and_helm_test_passes(self, release: Release) -> None:
        began = time.monotonic()
        wait_for(release.is_ready, START_SECONDS, "the release being ready")
        print(f"ready after {time.monotonic() - began:.0f} s")
        # A router without engines is alive, and takes no clients.
        assert ("readinessProbe", False) in release.pods["router"].probed
        assert ("livenessProbe", False) not in release.pods["router"].probed
        assert release.test.wait(60) == 0, release.test.log()
        assert "The router is ready.\ntiny: " in release.test.log()

    def test_kv_cache_travels_between_pods(self, release: Release) -> None:
        """Also where both are on one node, whose memory they share but not the namespaces that UCX could use it in."""
        reply = release.ask(prompt=list(range(5, 205)), max_tokens=8)
        assert (reply.status_code, reply.json()["usage"]["completion_tokens"]) == (200, 8), release.logs()
        url = f"{release.pods['router'].url}/requests/{reply.headers['x-request-id']}"
        transfer = wait_for(
            lambda: requests.get(url, timeout=10).json().get("kv_transfer"), 30, "the transfer's record"
        )
        assert transfer["kv_bytes"] > 0

    def test_deleting_every_pod_at_once_ends_the_open_stream_whole(self, release: Release) -> None:
        """As `helm uninstall`: hooks, the router's draining and the engines' time-outs fit into the grace periods."""
        count, pods = 800, release.pods
        _, pre_stop = pods["decode"].spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        with release.ask(max_tokens=count, stream=True, stream_options={"include_usage": True}) as reply:
            lines = filter(None, reply.iter_lines())
            next(lines)
            with ThreadPoolExecutor(len(pods)) as pool:
                began = time.monotonic()
                ending = {component: pool.submit(release.delete, component) for component in pods}
                wait_for(lambda: not pods["router"].is_ready, 30, "the router saying that it is not ready")
                *_, usage, done = lines
                took = time.monotonic() - began
                ended = {component: future.result() for component, future in ending.items()}
        print(f"the stream ended after {took:.1f} s; {ended}")
        assert done == b"data: [DONE]", release.logs()
        assert json.loads(usage.removeprefix(b"data: "))["usage"]["completion_tokens"] == count
        assert took > float(pre_stop), "the stream should outlive the engines' SIGTERM to be a test"
        assert {c: (e.exit_code, e.was_killed) for c, e in ended.items()} == dict.fromkeys(pods, (0, False))
