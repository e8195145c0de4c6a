"""What the chart makes of each set of values: as reviewed, and as Kubernetes takes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from helm_python import Chart, lint
from kubernetes_validate import utils

from tests.deploy.chart import CHART, GOLDEN, SETS, Object, chart, objects_of, render_text, values_of
from tests.deploy.renew import SCHEMA, schema_text

KUBERNETES = ("1.29", "1.33", "1.37")
CUSTOM = {path.stem: json.loads(path.read_text()) for path in (Path(__file__).parent / "schemas").glob("*.json")}
"""Schemas of the kinds that Kubernetes does not know by itself, by kind."""


@pytest.fixture(autouse=True)
def read_schemas_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """kubernetes-validate reads a megabyte of definitions for each object."""
    monkeypatch.setattr(utils, "schema_contents", _schema_contents)


_schema_contents = cache(utils.schema_contents)


@pytest.mark.parametrize("name", SETS)
def test_lint_finds_nothing(name: str) -> None:
    report = lint(CHART, values_of(name), strict=True)
    assert report["errors"] == []
    # 1 is for information: Helm would like an icon.
    assert [message for message in report["messages"] if message["severity"] > 1] == []


@pytest.mark.parametrize("name", SETS)
def test_manifests_are_the_reviewed_ones(name: str) -> None:
    golden = GOLDEN / f"{name}.yaml"
    assert render_text(values_of(name), chart()) == golden.read_text(), "run `make chart` and look at the diff"


def test_every_golden_file_is_of_a_set() -> None:
    assert {path.stem for path in GOLDEN.glob("*.yaml")} == set(SETS)


def test_the_router_s_options_in_the_schema_are_the_router_s() -> None:
    assert SCHEMA.read_text() == schema_text(), "the router's settings changed: run `make chart`"


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", SETS)
def test_kubernetes_takes_the_manifests(name: str, version: str) -> None:
    for found in objects_of(name):
        for checked in (found, *pod_templates(found)):
            if checked["kind"] in CUSTOM:
                jsonschema.validate(checked, CUSTOM[checked["kind"]])
            else:
                kubernetes_validate.validate(checked, version, strict=True)


@pytest.mark.parametrize("version", KUBERNETES)
def test_a_wrong_manifest_is_found(version: str) -> None:
    deployment = json.loads(json.dumps(next(o for o in objects_of("minimal") if o["kind"] == "Deployment")))
    deployment["spec"]["template"]["spec"]["contaners"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="contaners"):
        kubernetes_validate.validate(deployment, version, strict=True)


@pytest.mark.parametrize("name", SETS)
def test_no_two_objects_have_one_name(name: str) -> None:
    names = [(o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"]) for o in objects_of(name)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", SETS)
def test_pods_follow_the_restricted_standard(name: str) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/, for the pods' own containers."""
    for spec in pod_specs(objects_of(name)):
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            if container["name"] == "sidecar":
                continue
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"]["drop"] == ["ALL"]
            assert set(context["capabilities"].get("add", ())) <= {"IPC_LOCK"}
            # One set switches it off, to show that a pool's false wins over both pools' true.
            assert context["readOnlyRootFilesystem"] is (not (name == "everything" and "decode" in container["name"]))


@pytest.mark.parametrize("name", SETS)
def test_volumes_are_mounted_and_mounts_exist(name: str) -> None:
    for spec in pod_specs(objects_of(name)):
        volumes = {volume["name"] for volume in spec.get("volumes", ())}
        containers = [*spec.get("initContainers", ()), *spec["containers"]]
        mounts = {mount["name"] for container in containers for mount in container.get("volumeMounts", ())}
        assert mounts == volumes


@pytest.mark.parametrize("name", SETS)
def test_probes_and_services_name_ports_that_there_are(name: str) -> None:
    for spec in pod_specs(objects_of(name)):
        for container in spec["containers"]:
            ports = {port["name"] for port in container.get("ports", ())}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                if probe in container:
                    (action,) = container[probe].keys() & {"httpGet", "tcpSocket"}
                    assert container[probe][action]["port"] in ports


def test_the_packaged_chart_is_whole(tmp_path: Path) -> None:
    """What `helm package` makes, without what .helmignore leaves out, renders the same."""
    packaged = Chart.load(Chart.load(CHART).save(tmp_path))
    values: Object = {"model": "m", "metrics": {"rules": {"enabled": True}}}
    assert render_text(values, packaged) == render_text(values, Chart.load(CHART))


def test_each_dashboard_and_each_file_of_rules_becomes_an_object() -> None:
    """Those that the chart ships; the golden files are without them."""
    values: Object = {"model": "m", "metrics": {"rules": {"enabled": True}}}
    objects = [found for found in yaml.safe_load_all(render_text(values, Chart.load(CHART))) if found]
    made = {(found["kind"], found["metadata"]["name"].removeprefix("llm-tknp-")) for found in objects}
    dashboards = {("ConfigMap", f"dashboard-{path.stem}") for path in (CHART / "dashboards").glob("*.json")}
    rules = {("PrometheusRule", path.stem) for path in (CHART / "rules").glob("*.yaml")}
    assert {(kind, name) for kind, name in made if kind in ("ConfigMap", "PrometheusRule")} == dashboards | rules
    for found in objects:
        if found["kind"] == "PrometheusRule":
            jsonschema.validate(found, CUSTOM["PrometheusRule"])


def pod_templates(found: Object) -> list[Object]:
    """Those of a LeaderWorkerSet, as objects that Kubernetes has a schema for."""
    if found["kind"] != "LeaderWorkerSet":
        return []
    group = found["spec"]["leaderWorkerTemplate"]
    templates = [group["leaderTemplate"], group["workerTemplate"]]
    return [{"apiVersion": "v1", "kind": "PodTemplate", "template": template} for template in templates]


def pod_specs(objects: list[Object]) -> Iterator[dict[str, Any]]:
    for found in objects:
        if found["kind"] in ("Deployment", "StatefulSet"):
            yield found["spec"]["template"]["spec"]
        elif found["kind"] == "Pod":
            yield found["spec"]
        yield from (template["template"]["spec"] for template in pod_templates(found))


def test_the_sets_parse_as_yaml_without_repeated_keys() -> None:
    """YAML takes the last of two equal keys without a word."""
    for path in (*SETS.values(), CHART / "values.yaml"):
        _no_repeated_keys(yaml.compose(path.read_text()), path)


def _no_repeated_keys(node: yaml.Node | None, path: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{path}: a key is there twice, line {node.start_mark.line + 1}"
        for _, value in node.value:
            _no_repeated_keys(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _no_repeated_keys(item, path)
