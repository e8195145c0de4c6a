"""The schema against the router: what it calls valid is accepted, what it calls invalid is refused, both ways."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from router.types import Api, Task
from tests.router.answers import answer_any
from tests.router.conftest import Stack, StartStack
from tests.router.running import wait_for
from tests.router.scripted_engine import MODEL

NUM_EXAMPLES = 50  # for each operation; the coverage phase adds some 800 cases of its own
SEED = 20261121
ROOT = Path(__file__).parents[2]


def with_served_models(schema: Any) -> Any:
    """The schema in which a model is one that is served; any other is a 404, and tests nothing else."""
    if isinstance(schema, dict):
        if str(schema.get("description", "")).startswith("A model that"):
            return {"enum": [MODEL]}
        return {name: with_served_models(value) for name, value in schema.items()}
    return [with_served_models(value) for value in schema] if isinstance(schema, list) else schema


@pytest.mark.timeout(300)
def test_schemathesis_finds_nothing(start_stack: StartStack, tmp_path: Path) -> None:
    stack = start_stack(models_interval=0.1)
    stack.decode[0].behaviour = answer_any
    stack.decode[0].models = [{"id": MODEL, "object": "model"}]  # without a length that requests must keep within
    wait_for(lambda: "max_model_len" not in stack.router.state.pool.models()[MODEL])
    schema = tmp_path / "openapi.json"
    schema.write_bytes(orjson.dumps(with_served_models(stack.router.call("GET", "/openapi.json").json())))
    options = f"--phases coverage,fuzzing --checks all --max-examples {NUM_EXAMPLES} --seed {SEED} --no-color"
    command = [sys.executable, "-m", "schemathesis.cli", "run", str(schema), "--url", stack.router.url]
    done = subprocess.run(
        [*command, *options.split(), "--generation-database", "none", "--request-timeout", "20"],
        cwd=tmp_path,  # it leaves a cache behind
        env={**os.environ, "SCHEMATHESIS_HOOKS": "tests.router.schema_hooks", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    wait_for(stack.router.is_idle)


def test_every_route_is_described(stack: Stack) -> None:
    document = stack.router.call("GET", "/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    described = {(path, method.upper()) for path, methods in document["paths"].items() for method in methods}
    assert {(path, "POST") for path in (*Api, *Task)} < described
    served = {
        (getattr(route, "path", "").replace(":path", ""), method)
        for route in stack.router.server.config.app.routes  # type: ignore[union-attr]
        for method in getattr(route, "methods", None) or ()
        if method != "HEAD"
    }
    assert served - described == {("/openapi.json", "GET")}


def test_errors_and_streams_are_described(stack: Stack) -> None:
    document = stack.router.call("GET", "/openapi.json").json()
    for api in Api:
        responses = document["paths"][api]["post"]["responses"]
        assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
        assert {"400", "404", "408", "413", "431", "500", "502", "503", "504"} <= set(responses)
        for status, response in responses.items():
            if status != "200":
                assert response["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ErrorBody"}
    assert document["components"]["schemas"]["ErrorBody"]["required"] == ["error"]
