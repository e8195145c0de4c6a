"""The chart as the tests see it: rendered by Helm's own engine, which helm-python-sdk carries."""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from helm_python import Chart

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "tknp"
GOLDEN = Path(__file__).parent / "golden"
SETS = {
    path.stem: path
    for path in (
        *sorted((CHART.parent / "examples").glob("*.yaml")),
        CHART / "values-cpu.yaml",
        Path(__file__).parent / "values" / "everything.yaml",
    )
}
"""Sets of values by name: the examples, the CPU profile, and one with everything switched on."""

Object = dict[str, Any]


FOLDERS_OF_FILES = ("dashboards", "rules")
"""What the chart takes as it is; megabytes of it would hide the rest of a golden file."""


@cache
def chart() -> Chart:
    """The chart without its dashboards and rules."""
    with tempfile.TemporaryDirectory() as folder:
        copied = shutil.copytree(CHART, Path(folder) / CHART.name, ignore=shutil.ignore_patterns(*FOLDERS_OF_FILES))
        return Chart.load(copied)


def values_of(name: str) -> Object:
    values: Object = yaml.safe_load(SETS[name].read_text())
    return values


def render_text(values: Object, chart: Chart) -> str:
    """All manifests as one YAML stream, each template under its path, without notes."""
    manifests = chart.render(values=values, name="llm", namespace="serving")
    parts = [
        f"# Source: {path}\n---\n{text.strip().removeprefix('---').lstrip()}\n"
        for path, text in sorted(manifests.items())
        if text.strip() and not path.endswith(".txt")
    ]
    return "".join(parts)


def render(values: Object) -> list[Object]:
    """The objects that Helm would send to the cluster."""
    return [found for found in yaml.safe_load_all(render_text(values, chart())) if found]


@cache
def objects_of(name: str) -> list[Object]:
    """The objects of one of SETS; not to be changed."""
    return render(values_of(name))


def find(objects: list[Object], kind: str, name: str) -> Object:
    """The one object of this kind with this name."""
    (found,) = [entry for entry in objects if entry["kind"] == kind and entry["metadata"]["name"] == name]
    return found


def pod_spec(workload: Object) -> Object:
    """Of a Deployment or StatefulSet, or of the leader of a LeaderWorkerSet."""
    spec = workload["spec"]
    template = spec["leaderWorkerTemplate"]["leaderTemplate"] if "leaderWorkerTemplate" in spec else spec["template"]
    found: Object = template["spec"]
    return found


def command_lines(objects: list[Object]) -> list[list[str]]:
    """The words of every `tknp` that the pods run, without its name."""
    found = []
    for entry in objects:
        if entry["kind"] in ("Deployment", "StatefulSet", "LeaderWorkerSet"):
            spec = pod_spec(entry)
            for container in (*spec.get("initContainers", ()), *spec["containers"]):
                words = [*container.get("command", ()), *container.get("args", ())]
                if "tknp" in words:
                    found.append(words[words.index("tknp") + 1 :])
    return found
