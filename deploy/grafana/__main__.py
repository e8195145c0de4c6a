"""Writes the dashboards to deploy/helm/tknp/dashboards: `make dashboards`."""

from __future__ import annotations

import json
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana.decode import decode
from deploy.grafana.kv_transfer import kv_transfer
from deploy.grafana.overview import overview
from deploy.grafana.prefill import prefill
from deploy.grafana.router import router

FOLDER = Path(__file__).parents[1] / "helm/tknp/dashboards"


def dashboards() -> dict[str, str]:
    """The JSON of each dashboard by its file's name."""
    built = [make().build() for make in (overview, prefill, decode, kv_transfer, router)]
    return {f"{board.uid}.json": json.dumps(board, cls=JSONEncoder, indent=2, sort_keys=True) + "\n" for board in built}


def main() -> None:
    for old in FOLDER.glob("*.json"):
        old.unlink()
    FOLDER.mkdir(exist_ok=True)
    for name, text in dashboards().items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()
