from __future__ import annotations

import copy
from typing import Any

import pytest

from router.pods import MalformedPod, engine_url

READY: dict[str, Any] = {
    "metadata": {"name": "a"},
    "spec": {
        "containers": [{"name": "sidecar"}, {"name": "engine", "ports": [{"name": "http", "containerPort": 8100}]}]
    },
    "status": {"podIP": "10.1.2.3", "conditions": [{"type": "Ready", "status": "True"}]},
}


def pod(**changes: Any) -> dict[str, Any]:
    """READY with fields set, such as status__podIP; None removes one."""
    made = copy.deepcopy(READY)
    for path, value in changes.items():
        *parents, name = path.split("__")
        place = made
        for parent in parents:
            place = place[parent]
        place[name] = value
    return made


@pytest.mark.parametrize(
    ("changes", "port", "url"),
    [
        ({}, "http", "http://10.1.2.3:8100"),
        ({}, "9000", "http://10.1.2.3:9000"),
        ({"status__podIP": "fd00::7"}, "http", "http://[fd00::7]:8100"),
        ({}, "metrics", None),
        ({"metadata__deletionTimestamp": "2026-01-01T00:00:00Z"}, "http", None),
        ({"status__conditions": [{"type": "Ready", "status": "False"}]}, "http", None),
        ({"status__conditions": [{"type": "Initialized", "status": "True"}]}, "http", None),
        ({"status__conditions": None}, "http", None),
        ({"status": {}}, "http", None),
        ({"status": None}, "http", None),
    ],
)
def test_where_an_engine_listens(changes: dict[str, Any], port: str, url: str | None) -> None:
    assert engine_url(pod(**changes), port) == url


@pytest.mark.parametrize(
    "bad",
    [
        None,
        [],
        {},
        {"metadata": None},
        {"metadata": {"name": ""}},
        pod(metadata__name=7),
        pod(status__podIP=None),
        pod(status__podIP="http://evil"),
        pod(status__conditions="Ready"),
        pod(spec=None),
        pod(spec__containers=[None]),
    ],
)
def test_what_is_no_pod(bad: Any) -> None:
    with pytest.raises(MalformedPod):
        engine_url(bad, "http")
