"""What the dashboards and rules lack on a running system."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import yaml

from tests.deploy.dashboards import queries
from tests.deploy.prometheus import ROOT, Prometheus, rule_groups

SECONDS = 30.0  # that are looked at
RATE_INTERVAL = "10s"  # what Grafana makes of a scrape interval of 2 s

MAY_BE_ZERO = {
    "Requests that fail": "nothing fails here",
    "Share of requests that fail": "nothing fails here",
    "Preemptions": "the KV cache is large enough here",
    "Pulls that fail": "none does here",
    "Leases that end in vain": "nobody hangs up between the legs here",
    "Hidden behind the prefill": "nothing is streamed here",
    "Offers that were not used": "none is too old here",
    "Prefill engines asked again": "they answer at once here",
    "Engines that changed their role": "none was started with --kv-both here",
    "Pulled back, by what became of it": "no router was started with --pull-back-tokens here",
    "Repeated": "no engine dies here",
    "Requests that wait for KV cache": "a pull takes 30 ms here, and scrapes are 1 s apart",
    "KV cache in use": "prompts are gone after 100 ms here, and scrapes are 1 s apart",
    "KV cache in use over time": "of the prefill engine, as before",
}
"""Panels that show only zeros as long as all is well, or that scrapes may miss. They return series all the same."""


NOT_HERE = {"Pods that discovery finds": "there is no Kubernetes here; tests/kubernetes has it"}
"""Panels without data here. Prometheus takes their queries, and docs/metrics.md has their metrics."""


def lacking(prometheus: Prometheus) -> list[str]:
    """A line for each query without a number, and for each panel that has nothing but zeros and should not."""
    missing: list[str] = []
    silent: dict[str, bool] = {}
    for asked in queries():
        where = f"{asked.board}, {asked.panel}"
        values = _numbers(prometheus.range(asked.filled(RATE_INTERVAL), SECONDS))
        if asked.panel in NOT_HERE:
            continue
        if not values:
            missing.append(f"{where}: no data for {asked.expr}")
        elif asked.panel not in MAY_BE_ZERO:
            silent[where] = silent.get(where, True) and not any(values)
    return [*missing, *(f"{where}: zeros only" for where, is_silent in silent.items() if is_silent)]


def _numbers(found: Iterable[dict[str, list[tuple[float, str]]]]) -> list[float]:
    values = [float(value) for series in found for _, value in series["values"]]
    return [value for value in values if not math.isnan(value)]


def broken_rules(prometheus: Prometheus) -> list[str]:
    """Rules that Prometheus can't evaluate, or that ask for series that nobody has."""
    told = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert len(told) == sum(len(group["rules"]) for group in rule_groups())
    failed = [f"{rule['name']}: {rule['lastError']}" for rule in told if rule["health"] != "ok"]
    names = set(prometheus.get("label/__name__/values"))
    asked = [(rule["name"], name) for rule in told for name in re.findall(OURS, rule["query"])]
    return [*failed, *(f"{rule}: there is no {name}" for rule, name in asked if name not in names)]


def blind_autoscalers(prometheus: Prometheus) -> list[str]:
    """The queries of the chart's autoscalers that find nothing."""
    values = yaml.safe_load((ROOT / "deploy/helm/tknp/values.yaml").read_text())
    asked = [metric for pool in ("prefill", "decode") for metric in values[pool]["autoscaling"]["metrics"]]
    assert len(asked) == 4
    # On Kubernetes the include picks out one release's routers; here there is no other.
    queries = {metric["name"]: re.sub(r"{{-? *include[^}]*}}", "", metric["query"]) for metric in asked}
    return [name for name, query in queries.items() if not _numbers(prometheus.range(query, 5))]


OURS = r"\b(?:tknp_|tknp:|vllm:|kv_transfer_)[\w:]+"


def undocumented(prometheus: Prometheus) -> list[str]:
    """Metrics of ours that docs/metrics.md does not name."""
    text = (ROOT / "docs/metrics.md").read_text()
    names = {
        re.sub(r"_(bucket|sum|count)$", "", name)
        for name in prometheus.get("label/__name__/values")
        if name.startswith(("tknp_", "kv_transfer_", "token_parallel_", "prefill_requests", "decode_requests"))
        and not name.endswith("_created")
    }
    return sorted(name for name in names if f"`{name}`" not in text)
