"""What the pools scale on, computed by Prometheus' own engine from series as two routers export them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.chart import CHART, Object, render

METRICS = {
    "prefill_tokens": "prefill",
    "time_to_first_token_p95": "prefill",
    "kv_used_share": "decode",
    "time_per_token_p95": "decode",
}
FETCHED = CHART.parents[2] / ".prometheus" / "usr" / "bin" / "promtool"


@pytest.fixture
def promtool() -> str:
    found = str(FETCHED) if FETCHED.exists() else shutil.which("promtool")
    if found is None:
        pytest.skip("no promtool here: Debian's package prometheus has it")
    return found


def series(name: str, router: str, values: str, **labels: str) -> Object:
    labels |= {"namespace": "serving", "pod": f"llm-tknp-router-{router}"}
    inner = ",".join(f'{key}="{value}"' for key, value in labels.items())
    return {"series": f"{name}{{{inner}}}", "values": values}


def exported(router: str, rate: int) -> list[Object]:
    """20 samples of one router: two decode engines, of which one has a rank that is nearly full."""
    found = [
        series("tknp_engine_outstanding_tokens", router, "1000x20", role="prefill", engine="p0"),
        series("tknp_engine_outstanding_tokens", router, "9000x20", role="decode", engine="d0"),
    ]
    for engine, rank, free in (("d0", "0", 50), ("d0", "1", 10), ("d1", "0", 90)):
        found.append(series("tknp_engine_kv_blocks", router, "100x20", engine=engine, rank=rank))
        found.append(series("tknp_engine_kv_blocks_free", router, f"{free}x20", engine=engine, rank=rank))
    # Half of the first tokens within a second, the others within two.
    for bound, number in (("1", rate), ("2", 2 * rate), ("+Inf", 2 * rate)):
        found.append(series("tknp_time_to_first_token_seconds_bucket", router, f"0+{number}x20", le=bound))
    found.append(series("tknp_time_to_first_token_seconds_count", router, f"0+{2 * rate}x20"))
    found.append(series("tknp_inter_token_latency_seconds_count", router, "0x20"))
    return found


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # Prompt tokens over both routers; the fullest rank of each engine, on average: (0.9 + 0.1) / 2.
        (exported("a", 6) + exported("b", 6), (2000, 1.9, 0.5, 0)),
        (exported("a", 0), (1000, 0, 0.5, 0)),  # nobody asks
        ([], (None, None, None, None)),  # Prometheus does not reach the routers: no reason to shrink
    ],
    ids=["load", "idle", "blind"],
)
def test_queries_give_what_their_names_say(
    given: list[Object], expected: tuple[float | None, ...], promtool: str, tmp_path: Path
) -> None:
    scaling = {"autoscaling": {"enabled": True, "type": "hpa"}}
    objects = render({"model": "m", "engines": scaling})
    groups = [group for found in objects if found["kind"] == "PrometheusRule" for group in found["spec"]["groups"]]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": groups}))
    # Another release's, which must not count.
    other = {"series": 'tknp_engine_outstanding_tokens{role="prefill",namespace="other",pod="llm-tknp-router-a"}'}
    checks = []
    for (name, pool), value in zip(METRICS.items(), expected, strict=True):
        labels = f'{{namespace="serving",release="llm",pool="{pool}"}}'
        wanted = [{"labels": f"tknp_autoscaling_{name}{labels}", "value": value}]
        checks.append(
            {"expr": f"tknp_autoscaling_{name}", "eval_time": "5m", "exp_samples": wanted if value is not None else []}
        )
    test = {
        "interval": "15s",
        "input_series": [*given, other | {"values": "77777x20"}],
        "promql_expr_test": checks,
    }
    whole = {"rule_files": ["rules.yaml"], "evaluation_interval": "15s", "tests": [test]}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(whole))
    for words in (["check", "rules", "rules.yaml"], ["test", "rules", "test.yaml"]):
        ended = subprocess.run(
            [promtool, *words], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
