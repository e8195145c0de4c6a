"""What the chart refuses, and that its values are described."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml
from helm_python import HelmError

from tests.deploy.chart import CHART, Object, chart, render

SCHEMA = json.loads((CHART / "values.schema.json").read_text())


def nested(path: str, value: Any) -> Object:
    """{"a": {"b": value}} of "a.b"; dots inside the last part do not occur."""
    for key in reversed(path.split(".")):
        value = {key: value}
    found: Object = value
    return found


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("routr", {}, "additional properties 'routr' not allowed"),
        ("prefill.replica", 2, "at '/prefill': additional properties 'replica' not allowed"),
        ("router.replicas", "2", "at '/router/replicas': got string, want integer"),
        ("router.replicas", -1, "at '/router/replicas': minimum: got -1, want 0"),
        ("router.port", 80, "at '/router/port': minimum: got 80, want 1,024"),
        ("router.listen", "0.0.0.0 --no-decode-only", "at '/router/listen'"),
        (
            "router.options.prefil-policy",
            "x",
            "at '/router/options': additional properties 'prefil-policy' not allowed",
        ),
        ("router.options.port", 1, "at '/router/options': additional properties 'port' not allowed"),
        ("router.options.guard-share", 2, "at '/router/options/guard-share': maximum: got 2, want 1"),
        ("router.options.max-queue-length", "x", "at '/router/options/max-queue-length': got string, want"),
        ("router.extraArgs", [1], "at '/router/extraArgs/0': got number, want string"),
        ("router.service.type", "ExternalName", "one of 'ClusterIP', 'NodePort', 'LoadBalancer'"),
        ("router.apiKeys.key", "../../etc/passwd", "at '/router/apiKeys/key'"),
        ("router.tls.existingSecret", "Upper", "at '/router/tls/existingSecret'"),
        ("router.tls.clientCASecret", "ca", "router.tls.clientCASecret needs router.tls.existingSecret"),
        ("router.ingress.enabled", True, "router.ingress.hosts is empty"),
        ("router.httpRoute.enabled", True, "router.httpRoute.parentRefs is empty"),
        ("engines.device", "tpu", "at '/engines/device': value must be one of 'cuda', 'cpu'"),
        ("engines.options.Max_Model_Len", 1, "'Max_Model_Len' does not match"),
        ("engines.options.host", "::", "engines.options.host is the chart's to set; use the value listen"),
        ("decode.options.api-key", "k", "decode.options.api-key is the chart's to set; use the value engineApiKey"),
        ("engines.env.A-B", "x", "invalid propertyName 'A-B'"),
        ("engines.env.X", {"value": "x"}, "missing property 'valueFrom'"),
        ("engines.gpu.count", -1, "at '/engines/gpu/count': minimum: got -1, want 0"),
        ("engines.resources.requests", {"memory": "64 GB"}, "at '/engines/resources/requests/memory'"),
        ("prefill.tokenParallelSize", 2, "set decode.tokenParallelSize"),
        ("decode.tokenParallelSize", 0, "at '/decode/tokenParallelSize': minimum: got 0, want 1"),
        ("decode.nodes", 3, "decode.nodes is 3"),
        ("prefill.nodes", 2, "a prefill engine has 1 workers, which can't be spread evenly over 2 nodes"),
        ("prefill", {"nodes": 2, "multiNode": {"backend": "native"}, "gpu": {"count": 8}}, "prefill.multiNode.backend"),
        ("prefill.autoscaling.enabled", True, "prefill.autoscaling.serverAddress is empty"),
        ("prefill.autoscaling", {"enabled": True, "minReplicas": 9}, "minReplicas is 9, more than maxReplicas"),
        ("decode.autoscaling.metrics", [{"name": "x"}], "missing properties 'query', 'type', 'target'"),
        ("decode.autoscaling", {"enabled": True, "metrics": []}, "decode.autoscaling is enabled without metrics"),
        ("router.extraPodSpec.containers", [], "invalid propertyName 'containers'"),
        ("engines.extraPodSpec", {"hostNetwork": True}, "invalid propertyName 'hostNetwork'"),
        ("engines.resources.claims", ["gpus"], "at '/engines/resources/claims/0': got string, want object"),
        ("metrics.rules.runbookBaseUrl", "git.example.org/tknp", "at '/metrics/rules/runbookBaseUrl'"),
        ("metrics.rules.runbookBaseUrl", "https://x/ # y", "at '/metrics/rules/runbookBaseUrl'"),
        ("image.repository", "x; rm -rf /", "at '/image/repository'"),
        ("image.tag", "a b", "at '/image/tag'"),
        ("model", "--trust-remote-code", "at '/model': '--trust-remote-code' does not match"),
        ("model", "m\n  privileged: true", "at '/model'"),
        ("fullnameOverride", "x\n  y: z", "at '/fullnameOverride'"),
        ("huggingFace.token", "a\nb: c", "at '/huggingFace/token'"),
        ("huggingFace", {"token": "a", "existingSecret": "b"}, "are both set; give one"),
        ("modelCache.type", "nfs", "at '/modelCache/type': value must be one of"),
        ("modelCache.mountPath", "models", "at '/modelCache/mountPath'"),
        ("discovery.mode", "dns", "at '/discovery/mode': value must be one of 'kubernetes', 'static'"),
        ("metrics.podMonitor.enabled", "yes", "value must be one of true, false, 'auto'"),
    ],
)
def test_wrong_values_are_refused_with_a_clear_message(path: str, value: Any, message: str) -> None:
    with pytest.raises(HelmError) as refused:
        render({"model": "m"} | nested(path, value))
    assert message in str(refused.value)


def test_a_model_must_be_named() -> None:
    with pytest.raises(HelmError, match="model is not set: name a model of the Hugging Face hub"):
        render({})


def test_static_pools_do_not_scale_by_themselves() -> None:
    scaling = {"autoscaling": {"enabled": True, "type": "hpa"}}
    with pytest.raises(HelmError, match=r"decode\.autoscaling needs discovery\.mode=kubernetes"):
        render({"model": "m", "discovery": {"mode": "static"}, "decode": scaling})


def test_keys_for_clients_must_not_blind_prometheus() -> None:
    values: Object = {"model": "m", "metrics": {"podMonitor": {"enabled": True}}}
    with pytest.raises(HelmError, match="/metrics asks for a key too"):
        render(values | {"router": {"apiKeys": {"existingSecret": "k"}}})
    render(values | {"router": {"apiKeys": {"existingSecret": "k", "openMetrics": True}}})


def test_text_in_values_stays_text() -> None:
    """Whatever the schema lets through is one word of a command line, and not YAML of its own."""
    hostile = 'x"}\n- --port=1\n  {{ .Release.Name }} \\ \u2028 $(HOME)'
    (found,) = [
        entry["spec"]["template"]["spec"]["containers"][0]
        for entry in render({"model": "m", "prefill": {"options": {"chat-template": hostile}, "env": {"X": hostile}}})
        if entry["kind"] == "Deployment" and entry["metadata"]["name"].endswith("-prefill")
    ]
    assert f"--chat-template={hostile}" in found["args"]
    assert {"name": "X", "value": hostile} in found["env"]


def test_every_value_is_in_the_schema_and_the_other_way_round() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    # Both pools know the same keys, which are described once, and an image of one's own is like the common one.
    pool = values["prefill"] | values["decode"] | values["engines"] | {"image": values["image"]}
    values |= {"engines": pool, "prefill": pool, "decode": pool}
    values["router"]["image"] = values["image"]
    values["metrics"]["podMonitor"]["routerAuthorization"] = {"name": "", "key": ""}
    assert _paths(values) == _schema_paths(SCHEMA) - {"global"}


def _paths(values: Any, path: str = "") -> set[str]:
    """Of every key, down to where the schema says no more."""
    if not isinstance(values, dict):
        return set()
    schema = _at(path)
    if schema.get("additionalProperties") is not False:
        return set()
    found = set()
    for key, value in values.items():
        below = f"{path}.{key}".lstrip(".")
        found |= {below} | _paths(value, below)
    return found


def _schema_paths(schema: Object, path: str = "") -> set[str]:
    found = set()
    if schema.get("additionalProperties") is False:
        for key, value in schema["properties"].items():
            below = f"{path}.{key}".lstrip(".")
            if not path.endswith("options"):
                found |= {below} | _schema_paths(_resolve(value), below)
    return found


def _resolve(schema: Object) -> Object:
    name = schema.get("$ref")
    found: Object = SCHEMA["definitions"][name.removeprefix("#/definitions/")] if name else schema
    return found


def _at(path: str) -> Object:
    schema: Object = SCHEMA
    for key in filter(None, path.split(".")):
        schema = _resolve(schema["properties"][key])
    return schema


def test_the_values_that_the_docs_name_exist() -> None:
    text = (CHART.parents[2] / "docs" / "install-kubernetes.md").read_text()
    table = text.partition("## Values worth knowing")[2].partition("##")[0]
    named = {name for row in table.splitlines() for name in re.findall(r"`([\w.]+)`", row.partition(" | ")[0])}
    assert len(named) > 15
    assert named - _schema_paths(SCHEMA) == set()


def test_every_line_of_the_values_is_described() -> None:
    """By a comment behind it, or above it, or by what it opens."""
    lines = (CHART / "values.yaml").read_text().splitlines()
    undescribed = []
    for before, line in zip(["", *lines], lines, strict=False):
        key = re.match(r" *([A-Za-z]+):(.*)", line)  # not the fields of a list's items
        is_described = "#" in line or before.lstrip().startswith("#") or not (key and key[2].strip())
        if not is_described and key and key[1] not in ("type", "query"):  # of a metric: the comment above the list says
            undescribed.append(line)
    assert undescribed == []


def test_notes_say_how_to_ask() -> None:
    notes = chart().render(values={"model": "org/name"}, name="llm", namespace="serving")["tknp/templates/NOTES.txt"]
    assert "kubectl -n serving port-forward service/llm-tknp-router 8000:80" in notes
    assert '"model": "org/name"' in notes


@pytest.mark.parametrize("served", [["tiny", "small"], "tiny"])
def test_notes_name_the_model_as_it_is_served(served: Any) -> None:
    values: Object = {"model": "/tmp/model", "engines": {"options": {"served-model-name": served}}}
    notes = chart().render(values=values, name="llm", namespace="serving")["tknp/templates/NOTES.txt"]
    assert '"model": "tiny"' in notes
