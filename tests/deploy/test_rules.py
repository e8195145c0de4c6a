"""The Prometheus rules: promtool's unit tests beside this file, and that they leave nothing out."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.prometheus import CONFIG, MISSING, ROOT, RULES, find_program, rule_groups

TESTS = Path(__file__).parent / "rules"


def rules(kind: str) -> list[dict[str, Any]]:
    """Those that have the key `kind`: alert or record."""
    return [rule for group in rule_groups() for rule in group["rules"] if kind in rule]


def unit_tests(key: str) -> list[dict[str, Any]]:
    tests = [test for path in sorted(TESTS.glob("*.yaml")) for test in yaml.safe_load(path.read_text())["tests"]]
    return [case for test in tests for case in test.get(key, ())]


def promtool(*words: str | Path) -> None:
    program = find_program("promtool")
    if program is None:
        pytest.skip(MISSING.format("promtool"))
    done = subprocess.run([program, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_configuration_and_its_rules_are_valid() -> None:
    promtool("check", "config", CONFIG)
    promtool("check", "rules", *sorted(RULES.glob("*.yaml")))


def test_what_they_say_of_given_numbers() -> None:
    promtool("test", "rules", *sorted(TESTS.glob("*.yaml")))


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_is_quiet() -> None:
    fires = {case["alertname"] for case in unit_tests("alert_rule_test") if case["exp_alerts"]}
    quiet = {case["alertname"] for case in unit_tests("alert_rule_test") if not case["exp_alerts"]}
    assert fires == quiet == {rule["alert"] for rule in rules("alert")}


def test_every_recording_rule_has_an_expected_value() -> None:
    tested = {name for case in unit_tests("promql_expr_test") for name in re.findall(r"tknp:[\w:]+", case["expr"])}
    assert tested == {rule["record"] for rule in rules("record")}


def test_names_are_unique() -> None:
    """An operator's PrometheusRule may hold several records of one name, but ours would only hide a mistake."""
    for kind in ("alert", "record"):
        names = [rule[kind] for rule in rules(kind)]
        assert sorted(names) == sorted(set(names))


def test_files_hold_nothing_that_a_prometheusrule_does_not_take() -> None:
    """The chart puts them under `spec` as they are."""
    for path in RULES.glob("*.yaml"):
        assert list(yaml.safe_load(path.read_text())) == ["groups"]
    assert {key for group in rule_groups() for key in group} == {"name", "rules"}


@pytest.mark.parametrize("alert", rules("alert"), ids=lambda rule: str(rule["alert"]))
def test_an_alert_says_what_is_wrong_and_where_to_read_on(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert {"summary", "description", "runbook"} <= set(alert["annotations"])
    path, _, anchor = alert["annotations"]["runbook"].partition("#")
    sections = re.split(r"^#+ (.*)$", (ROOT / path).read_text(), flags=re.MULTILINE)
    texts = {re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")): text for title, text in batched(sections[1:])}
    assert f"`{alert['alert']}`" in texts[anchor], "the section should say by which alerts one comes to it"


def batched(items: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Two at a time."""
    return zip(items[::2], items[1::2], strict=True)


def test_the_docs_explain_every_recording_rule() -> None:
    explained = (ROOT / "docs/monitoring.md").read_text()
    assert [rule["record"] for rule in rules("record") if f"`{rule['record']}`" not in explained] == []


def test_the_docs_list_every_alert_with_its_severity() -> None:
    listed = re.findall(r"^\| `(Tknp\w+)` \| (\w+) \|", (ROOT / "docs/monitoring.md").read_text(), re.MULTILINE)
    assert listed == [(rule["alert"], rule["labels"]["severity"]) for rule in rules("alert")]
