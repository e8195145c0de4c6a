"""The committed dashboards, as Grafana would read them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from deploy.grafana.__main__ import FOLDER


@dataclass(frozen=True)
class Asked:
    """One query of one panel."""

    board: str
    panel: str
    expr: str

    def filled(self, rate_interval: str) -> str:
        """As Grafana sends it, with every variable at All."""
        filled = self.expr.replace("$__rate_interval", rate_interval)
        for variable in ("$namespace", "$engine"):
            filled = filled.replace(variable, ".*")
        assert "$" not in filled, filled
        return filled


def boards() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that show something."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def queries() -> Iterator[Asked]:
    for board in boards():
        for panel in panels(board):
            for target in panel["targets"]:
                yield Asked(board["title"], panel["title"], target["expr"])
