"""Writes again what follows from other files, to be looked at in the diff: `make chart`.

- golden/*.yaml: what the chart makes of each set of values;
- the router's options in values.schema.json, from the router's settings.
"""

from __future__ import annotations

import json
from typing import Any

from router.settings import RouterSettings
from tests.deploy.chart import CHART, GOLDEN, SETS, chart, render_text, values_of

SCHEMA = CHART / "values.schema.json"
_SET_BY_THE_CHART = (
    *("host", "port", "drain-seconds", "shutdown-timeout", "prefill-urls", "decode-urls", "open-metrics"),
    *("api-keys-file", "engine-api-key", "engine-api-key-file", "ssl-certfile", "ssl-keyfile", "ssl-ca-certs"),
    *("discovery", "kubernetes-namespace", "kubernetes-selector-prefill", "kubernetes-selector-decode"),
)


def router_options() -> dict[str, Any]:
    """JSON schema of `router.options`: each option of `tknp router` that is not the chart's to set, or null."""
    fields = RouterSettings.model_json_schema()["properties"]
    options = {}
    for field, schema in fields.items():
        name = field.replace("_", "-")
        if name not in _SET_BY_THE_CHART:
            kept = {key: value for key, value in schema.items() if key not in ("title", "default", "format")}
            description = kept.pop("description")
            choices = kept.pop("anyOf", [kept])
            (only,) = [choice for choice in choices if choice["type"] != "null"]
            options[name] = {"description": description, **only, "type": [only["type"], "null"]}
            if "enum" in only:
                options[name]["enum"] = [*only["enum"], None]
    return {"type": "object", "additionalProperties": False, "properties": options}


def schema_text() -> str:
    schema = json.loads(SCHEMA.read_text())
    schema["definitions"]["routerOptions"] = router_options()
    return json.dumps(schema, indent=2) + "\n"


def main() -> None:
    SCHEMA.write_text(schema_text())
    GOLDEN.mkdir(exist_ok=True)
    for path in GOLDEN.glob("*.yaml"):
        path.unlink()
    for name in SETS:
        (GOLDEN / f"{name}.yaml").write_text(render_text(values_of(name), chart()))


if __name__ == "__main__":
    main()
