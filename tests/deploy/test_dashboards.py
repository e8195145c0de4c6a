"""The JSON of the dashboards. That their queries return data is tests/e2e/test_observability.py's business."""

from __future__ import annotations

import re
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from deploy.grafana.__main__ import FOLDER, dashboards
from router.discovery import KubernetesDiscovery
from router.settings import RouterSettings
from tests.deploy.dashboards import boards, panels, queries
from tests.deploy.prometheus import ROOT
from tests.deploy.test_rules import rules
from tests.e2e.panel_data import MAY_BE_ZERO, NOT_HERE

NAMING_PANELS = ("troubleshooting", "operating")


def test_the_committed_json_is_what_the_code_builds() -> None:
    committed = {path.name: path.read_text() for path in FOLDER.iterdir()}
    assert committed == dashboards(), "run `make dashboards`"


@pytest.mark.parametrize("board", boards(), ids=lambda board: str(board["uid"]))
def test_a_board_is_one_that_grafana_takes(board: dict[str, Any]) -> None:
    assert len(board["uid"]) <= 40, "Grafana's limit"
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    titles = [panel["title"] for panel in panels(board)]
    assert len(titles) == len(set(titles)), "a panel is known by its title, in the docs too"
    cells = [cell for panel in board["panels"] for cell in occupied(panel["gridPos"])]
    assert len(cells) == len(set(cells)), "two panels overlap"
    assert all(x < 24 for x, _ in cells)
    for panel in panels(board):
        assert panel["description"], panel["title"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}


def occupied(grid: dict[str, int]) -> list[tuple[int, int]]:
    xs, ys = range(grid["x"], grid["x"] + grid["w"]), range(grid["y"], grid["y"] + grid["h"])
    return [(x, y) for x in xs for y in ys]


def test_a_board_asks_for_the_engines_only_if_it_lets_one_choose() -> None:
    for board in boards():
        has_variable = "engine" in {variable["name"] for variable in board["templating"]["list"]}
        asks = any("$engine" in asked.expr for asked in queries() if asked.board == board["title"])
        assert has_variable == asks, board["title"]


def test_what_is_recorded_is_there() -> None:
    recorded = {rule["record"] for rule in rules("record")}
    asked = {name for query in queries() for name in re.findall(r"tknp:[\w:]+", query.expr)}
    assert asked <= recorded


def test_the_panels_that_the_docs_name_exist() -> None:
    text = " ".join(" ".join((ROOT / f"docs/{name}.md").read_text() for name in NAMING_PANELS).split())
    titles = {panel["title"] for board in boards() for panel in panels(board)}
    named = set(re.findall(r"(?<!\*)\*([A-Z][^*\n]+)\*(?!\*)", text))
    assert len(named) > 5 and named <= titles
    boards_named = re.findall(r"^\| `(tknp / [^`]+)`", (ROOT / "docs/monitoring.md").read_text(), re.MULTILINE)
    assert sorted(boards_named) == sorted(board["title"] for board in boards())


def test_the_docs_explain_the_metrics_of_vllm_that_are_used() -> None:
    used = {name for query in queries() for name in re.findall(r"vllm:\w+", query.expr)}
    used |= {
        name for kind in ("alert", "record") for rule in rules(kind) for name in re.findall(r"vllm:\w+", rule["expr"])
    }
    explained = set(re.findall(r"`(vllm:\w+)`", (ROOT / "docs/metrics.md").read_text()))
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in used} == explained


def test_the_panels_that_may_be_zero_exist() -> None:
    assert MAY_BE_ZERO.keys() | NOT_HERE.keys() <= {panel["title"] for board in boards() for panel in panels(board)}


def test_the_metrics_of_panels_without_data_in_tests_exist() -> None:
    registry = CollectorRegistry()
    settings = RouterSettings.model_construct(kubernetes_namespace="any")  # without looking for a cluster
    KubernetesDiscovery(settings, registry)
    exist = {sample.name for family in registry.collect() for sample in family.samples}
    asked = {name for q in queries() if q.panel in NOT_HERE for name in re.findall(r"tknp_\w+", q.expr)}
    assert asked and asked <= exist
