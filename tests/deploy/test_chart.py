"""What the manifests mean: who drains for how long, who may do and reach what, what scales on what."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_python import Chart

from tests.deploy.chart import CHART, SETS, Object, command_lines, find, objects_of, pod_spec, render, render_text
from tests.router.conftest import StartStack, loop_of_engines, start_stack
from tests.router.running import wait_for
from tests.router.scripted_engine import MODEL

__all__ = ["loop_of_engines", "start_stack"]
WORKLOADS = ("Deployment", "StatefulSet", "LeaderWorkerSet")


def workloads(name: str) -> list[Object]:
    return [found for found in objects_of(name) if found["kind"] in WORKLOADS]


def option(words: list[str], name: str) -> str:
    (found,) = [word.partition("=")[2] for word in words if word.startswith(f"{name}=")]
    return found


@pytest.mark.parametrize("name", SETS)
def test_pods_live_long_enough_to_drain(name: str) -> None:
    for workload in workloads(name):
        spec = pod_spec(workload)
        words = next(words for words in command_lines([workload]) if words[0] != "make-model")
        needed = float(option(words, "--shutdown-timeout"))
        if words[0] == "router":
            needed += float(option(words, "--drain-seconds"))
            assert "lifecycle" not in spec["containers"][0]  # the router drains by itself
        else:
            (_, seconds) = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
            needed += float(seconds)
        assert needed < spec["terminationGracePeriodSeconds"] <= needed + 30


def test_a_busy_router_is_not_killed() -> None:
    """Liveness asks for nothing that depends on engines, and has more patience than readiness."""
    container = pod_spec(find(objects_of("minimal"), "Deployment", "llm-tknp-router"))["containers"][0]
    ready, alive = container["readinessProbe"], container["livenessProbe"]
    assert (ready["httpGet"]["path"], alive["httpGet"]["path"]) == ("/ready", "/health")
    assert alive["timeoutSeconds"] * alive["failureThreshold"] >= 60
    assert ready["periodSeconds"] * ready["failureThreshold"] <= 5


def test_probes_speak_tls_where_the_router_does() -> None:
    router = pod_spec(find(objects_of("tls"), "Deployment", "llm-tknp-router"))["containers"][0]
    assert router["readinessProbe"]["httpGet"]["scheme"] == "HTTPS"
    # The kubelet has no certificate for a router that asks for one.
    router = pod_spec(find(objects_of("everything"), "Deployment", "llm-tknp-router"))["containers"][0]
    assert all("tcpSocket" in router[probe] for probe in ("startupProbe", "readinessProbe", "livenessProbe"))


def test_an_upgrade_takes_no_router_away_and_no_spare_gpu() -> None:
    objects = objects_of("minimal")
    router, decode = (find(objects, "Deployment", f"llm-tknp-{name}") for name in ("router", "decode"))
    assert router["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert decode["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def test_a_new_version_of_the_chart_alone_restarts_no_engine(tmp_path: Path) -> None:
    copied = Path(shutil.copytree(CHART, tmp_path / "tknp"))
    about = copied / "Chart.yaml"
    about.write_text(re.sub(r"(?m)^version: .*$", "version: 9.9.9", about.read_text()))
    renewed = [entry for entry in yaml.safe_load_all(render_text({"model": "m"}, Chart.load(copied))) if entry]
    for role in ("router", "prefill", "decode"):
        before, after = (find(found, "Deployment", f"llm-tknp-{role}") for found in (render({"model": "m"}), renewed))
        assert before["metadata"]["labels"] != after["metadata"]["labels"]
        assert before["spec"]["template"] == after["spec"]["template"]


def test_the_router_may_see_pods_and_nothing_else() -> None:
    objects = objects_of("minimal")
    role = find(objects, "Role", "llm-tknp-discovery")
    assert role["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]}]
    binding = find(objects, "RoleBinding", "llm-tknp-discovery")
    account = pod_spec(find(objects, "Deployment", "llm-tknp-router"))["serviceAccountName"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": "serving"}]
    assert not {"ClusterRole", "ClusterRoleBinding"} & {found["kind"] for name in SETS for found in objects_of(name)}
    with_token = [w["metadata"]["name"] for w in workloads("minimal") if pod_spec(w)["automountServiceAccountToken"]]
    assert with_token == ["llm-tknp-router"]


def test_without_watching_there_is_no_role_and_no_token() -> None:
    objects = objects_of("static")
    assert not [found for found in objects if found["kind"] in ("Role", "RoleBinding")]
    assert not any(pod_spec(workload)["automountServiceAccountToken"] for workload in workloads("static"))


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """As Kubernetes does; the operator In is the only one that the chart uses."""
    for expression in selector.get("matchExpressions", ()):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


@pytest.mark.parametrize("name", SETS)
def test_selectors_select_the_pods_that_they_are_for(name: str) -> None:
    templates: dict[str, dict[str, str]] = {}
    for workload in workloads(name):
        group = workload["spec"].get("leaderWorkerTemplate")
        pods = [group["leaderTemplate"], group["workerTemplate"]] if group else [workload["spec"]["template"]]
        for template in pods:
            labels = template["metadata"]["labels"]
            templates[labels["app.kubernetes.io/component"]] = labels
    chosen = {}
    for found in objects_of(name):
        spec = found.get("spec", {})
        selector = spec.get("podSelector") or spec.get("selector")
        if selector and found["kind"] != "HorizontalPodAutoscaler":
            if found["kind"] == "Service":
                selector = {"matchLabels": selector}
            kind, purpose = found["kind"], found["metadata"]["name"].removeprefix("llm-tknp-")
            chosen[kind, purpose] = {c for c, labels in templates.items() if selects(selector, labels)}
    engines = set(templates) - {"router"}
    for (kind, purpose), components in chosen.items():
        if kind == "NetworkPolicy" and purpose == "engines":
            assert components == engines  # workers of other nodes too
        elif purpose == "engines":
            assert components == {"prefill", "decode"}  # those that serve /metrics
        else:
            assert components == {purpose}, kind


def test_engines_are_reached_by_those_who_must() -> None:
    policy = find(objects_of("minimal"), "NetworkPolicy", "llm-tknp-engines")
    engines, router, metrics = policy["spec"]["ingress"]
    assert selects(engines["from"][0]["podSelector"], labels_of("decode"))
    assert selects(router["from"][0]["podSelector"], labels_of("router"))
    assert "ports" not in engines  # UCX chooses its own
    assert metrics["ports"] == [{"port": "http"}]
    assert metrics["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]


def labels_of(component: str) -> dict[str, str]:
    workload = find(objects_of("minimal"), "Deployment", f"llm-tknp-{component}")
    labels: dict[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    return labels


@pytest.mark.parametrize("name", SETS)
def test_engines_tell_others_their_own_address(name: str) -> None:
    for workload in workloads(name):
        if workload["metadata"]["name"] != "llm-tknp-router":
            container = pod_spec(workload)["containers"][0]
            env = {entry["name"]: entry for entry in container["env"]}
            assert env["POD_IP"]["valueFrom"] == {"fieldRef": {"fieldPath": "status.podIP"}}
            assert env["VLLM_NIXL_SIDE_CHANNEL_HOST"]["value"] == env["VLLM_HOST_IP"]["value"] == "$(POD_IP)"
            assert container["env"][0]["name"] == "POD_IP"  # before those that refer to it
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            assert str(ports["side-channel"]) == option(container["args"], "--side-channel-port")
            assert str(ports["http"]) == option(container["args"], "--port")


def test_gpus_follow_from_the_options() -> None:
    gpus = {
        workload["metadata"]["name"]: pod_spec(workload)["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
        for workload in workloads("gpu")
    }
    assert gpus == {"llm-tknp-prefill": 2, "llm-tknp-decode": 4, "llm-tknp-router": None}


def test_gpus_by_claim() -> None:
    """Dynamic resource allocation: the pod names a template of a claim, and the container the claim."""
    gpus = {"name": "gpus", "resourceClaimTemplateName": "two-gpus"}
    engines: Object = {"gpu": {"count": 0}, "resources": {"claims": [{"name": "gpus"}]}}
    spec = pod_spec(
        find(
            render({"model": "m", "engines": engines | {"extraPodSpec": {"resourceClaims": [gpus]}}}),
            "Deployment",
            "llm-tknp-decode",
        )
    )
    assert spec["resourceClaims"] == [gpus]
    resources = spec["containers"][0]["resources"]
    assert (resources["claims"], "nvidia.com/gpu" in str(resources)) == ([{"name": "gpus"}], False)


@pytest.mark.parametrize("shared", ["engines", "everybody"])
def test_one_service_account_for_several_is_made_once(shared: str) -> None:
    account: Object = {"serviceAccount": {"name": "mine"}}
    values: Object = {"model": "m", "engines": account} | ({"router": account} if shared == "everybody" else {})
    names = [found["metadata"]["name"] for found in render(values) if found["kind"] == "ServiceAccount"]
    assert sorted(names) == (["mine"] if shared == "everybody" else ["llm-tknp-router", "mine"])


def test_secrets_are_in_no_command_line() -> None:
    text = "".join(str(words) for words in command_lines(objects_of("everything")))
    assert "hf_secret" not in text
    env = pod_spec(find(objects_of("everything"), "Deployment", "llm-tknp-prefill"))["containers"][0]["env"]
    key = next(entry for entry in env if entry["name"] == "VLLM_API_KEY")
    assert key["valueFrom"] == {"secretKeyRef": {"name": "engine-key", "key": "api-key"}}


@pytest.mark.parametrize("name", ["autoscaling-keda", "autoscaling-hpa", "everything"])
def test_a_pool_that_scales_has_no_number_of_its_own(name: str) -> None:
    scaled = {
        (found["spec"]["scaleTargetRef"]["kind"], found["spec"]["scaleTargetRef"]["name"])
        for found in objects_of(name)
        if found["kind"] in ("HorizontalPodAutoscaler", "ScaledObject")
    }
    without = {(w["kind"], w["metadata"]["name"]) for w in workloads(name) if "replicas" not in w["spec"]}
    assert scaled == without != set()


def test_what_an_autoscaler_asks_for_is_recorded() -> None:
    (hpa,) = [o for o in objects_of("autoscaling-hpa") if o["kind"] == "HorizontalPodAutoscaler"]
    (rules,) = [o for o in objects_of("autoscaling-hpa") if o["kind"] == "PrometheusRule" and "scaling" in str(o)]
    recorded = {rule["record"]: rule["labels"] for rule in rules["spec"]["groups"][0]["rules"]}
    asked = {m["external"]["metric"]["name"]: m["external"]["metric"]["selector"] for m in hpa["spec"]["metrics"]}
    assert {name: {"matchLabels": labels} for name, labels in recorded.items()} == asked


def test_queries_are_over_series_that_a_router_exports(start_stack: StartStack) -> None:
    stack = start_stack()
    stack.decode[0].ranks = [{"rank": 0, "num_blocks": 100, "num_free_blocks": 30, "num_requests": 0, "block_size": 16}]
    assert stack.router.complete(stream=True, max_tokens=4).status == 200
    wait_for(lambda: stack.router.metric("tknp_engine_kv_blocks", engine=stack.decode[0].name, rank="0"))
    text = stack.router.call("GET", "/metrics").body.decode()
    exported = set(re.findall(r"^(\w+)[{ ]", text, re.MULTILINE))
    queries = [
        trigger["metadata"]["query"]
        for found in objects_of("autoscaling-keda")
        if found["kind"] == "ScaledObject"
        for trigger in found["spec"]["triggers"]
    ]
    assert len(queries) == 4
    for query in queries:
        names = set(re.findall(r"\b(tknp_\w+)\{", query))
        assert names, query
        assert names <= exported
    assert re.search(r'^tknp_engine_outstanding_tokens{.*role="prefill".*}', text, re.MULTILINE)


def test_targets_name_their_component() -> None:
    """The label that rules and dashboards select by."""
    monitors = [found for found in objects_of("everything") if found["kind"] == "PodMonitor"]
    assert len(monitors) == 2
    for monitor in monitors:
        first = monitor["spec"]["podMetricsEndpoints"][0]["relabelings"][0]
        assert first["targetLabel"] == "component"
        assert first["sourceLabels"] == ["__meta_kubernetes_pod_label_app_kubernetes_io_component"]


@pytest.fixture
def chart_with_files(tmp_path: Path) -> Chart:
    """The chart with a dashboard and a file of rules, both full of what a template would choke on."""
    copied = Path(shutil.copytree(CHART, tmp_path / "tknp"))
    for folder in ("dashboards", "rules"):
        shutil.rmtree(copied / folder, ignore_errors=True)
        (copied / folder).mkdir()
    (copied / "dashboards" / "overview.json").write_text('{"title": "é {{ .Values }}", "legend": "{{rank}} <\\n>"}')
    (copied / "rules" / "alerts.yaml").write_text(
        "groups:\n  - name: a\n    rules:\n      - alert: Down\n        expr: tknp_engine_up == 0\n"
        "        annotations: {summary: '{{ $labels.engine }} is down'}\n"
    )
    return Chart.load(copied)


def test_dashboards_and_rules_are_taken_as_they_are(chart_with_files: Chart) -> None:
    values: Object = {"model": "m", "metrics": {"rules": {"enabled": True, "labels": {"release": "prom"}}}}
    objects = list(filter(None, yaml.safe_load_all(render_text(values, chart_with_files))))
    dashboard = find(objects, "ConfigMap", "llm-tknp-dashboard-overview")
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert dashboard["data"] == {"overview.json": '{"title": "é {{ .Values }}", "legend": "{{rank}} <\\n>"}'}
    rules = find(objects, "PrometheusRule", "llm-tknp-alerts")
    assert rules["metadata"]["labels"]["release"] == "prom"
    (rule,) = rules["spec"]["groups"][0]["rules"]
    assert rule["annotations"] == {"summary": "{{ $labels.engine }} is down"}


def test_alerts_link_to_the_docs_where_they_can_be_read() -> None:
    values: Object = {"model": "m", "metrics": {"rules": {"enabled": True}}}
    for base in ("", "https://git.example.org/tknp/blob/main"):
        values["metrics"]["rules"]["runbookBaseUrl"] = base
        objects = filter(None, yaml.safe_load_all(render_text(values, Chart.load(CHART))))
        groups = find(list(objects), "PrometheusRule", "llm-tknp-alerts")["spec"]["groups"]
        alerts = [rule["annotations"] for group in groups for rule in group["rules"]]
        key, start = ("runbook_url", f"{base}/docs/") if base else ("runbook", "docs/")
        assert all(alert[key].startswith(f"{start}troubleshooting.md#") for alert in alerts)
        assert base or not any("runbook_url" in alert for alert in alerts)  # a path is no URL to link to


def test_kinds_of_an_operator_are_made_only_where_they_are_known(chart_with_files: Chart) -> None:
    """Helm renders here without a cluster, so `auto` finds none of them."""
    objects = list(filter(None, yaml.safe_load_all(render_text({"model": "m"}, chart_with_files))))
    assert {found["apiVersion"] for found in objects} <= {
        *("v1", "apps/v1", "policy/v1", "networking.k8s.io/v1", "rbac.authorization.k8s.io/v1")
    }


class TestAsk:
    """`helm test` runs this script in a pod."""

    def ask(self, url: str, **env: str) -> subprocess.CompletedProcess[str]:
        (pod,) = [found for found in objects_of("minimal") if found["kind"] == "Pod"]
        python, flag, script = pod["spec"]["containers"][0]["command"]
        assert (python, flag) == ("python3", "-c")
        return subprocess.run(
            [sys.executable, "-c", script],
            env={"PATH": os.environ["PATH"], "URL": url, "TIMEOUT_SECONDS": "1", **env},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def test_an_answer(self, start_stack: StartStack) -> None:
        ended = self.ask(start_stack().router.url)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert ended.stdout.startswith(f"The router is ready.\n{MODEL}: ")

    def test_a_router_without_engines(self, start_stack: StartStack) -> None:
        ended = self.ask(start_stack(num_prefill=0, num_decode=0).router.url)
        assert ended.returncode == 1
        assert "is not ready" in ended.stderr
        assert "decode" in ended.stderr

    def test_nobody_there(self) -> None:
        ended = self.ask("http://127.0.0.1:9")
        assert ended.returncode == 1
        assert "Connection refused" in ended.stderr

    def test_keys(self, start_stack: StartStack, tmp_path: Path) -> None:
        keys = tmp_path / "keys"
        keys.write_text("sk-0123456789abcdef\n")
        url = start_stack(api_keys_file=keys).router.url
        without: Any = self.ask(url, NEEDS_KEY="1")
        assert (without.returncode, "helmTest.apiKey" in without.stdout) == (0, True)
        assert self.ask(url, NEEDS_KEY="1", API_KEY="sk-0123456789abcdef").returncode == 0
        assert self.ask(url, NEEDS_KEY="1", API_KEY="sk-wrong").returncode == 1
