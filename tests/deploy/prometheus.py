"""A real Prometheus for tests, with the configuration and the rules that operators are given."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
import yaml

from tknp.common.ports import free_port

ROOT = Path(__file__).parents[2]
FETCHED = ROOT / ".prometheus/usr/bin"  # by scripts/prometheus.sh
CONFIG = ROOT / "deploy/prometheus/prometheus.yml"
RULES = ROOT / "deploy/helm/tknp/rules"
MISSING = "no {}: `make prometheus` fetches Debian's package where there is apt; or install Prometheus"


def find_program(name: str) -> Path | None:
    """prometheus or promtool: the one that `make prometheus` fetched, else this machine's."""
    if (FETCHED / name).exists():
        return FETCHED / name
    return Path(found) if (found := shutil.which(name)) else None


def rule_groups() -> list[dict[str, Any]]:
    return [group for path in sorted(RULES.glob("*.yaml")) for group in yaml.safe_load(path.read_text())["groups"]]


class Prometheus:
    """A running server; see its HTTP API for what is returned."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **params: str | float) -> Any:
        """The `data` of an answer of /api/v1; a query that Prometheus refuses fails with its words."""
        reply = requests.get(f"{self.url}/api/v1/{path}", params=params, timeout=30).json()
        assert reply["status"] == "success", f"{params}: {reply.get('error')}"
        return reply["data"]

    def range(self, query: str, seconds: float, step: float = 1.0) -> list[dict[str, Any]]:
        """The series of the last `seconds`: `metric`, its labels, and `values`, pairs of a time and a text."""
        now = time.time()
        found: list[dict[str, Any]] = self.get("query_range", query=query, start=now - seconds, end=now, step=step)[
            "result"
        ]
        return found


@contextmanager
def run_prometheus(folder: Path, router: str, interval: str = "1s") -> Iterator[Prometheus]:
    """Scrapes what the router at `router`, a URL, tells; as deploy/prometheus says, but as often as `interval`."""
    program = find_program("prometheus")
    assert program is not None
    config = yaml.safe_load(CONFIG.read_text())
    config["global"] = {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval}
    config["rule_files"] = [str((CONFIG.parent / pattern).resolve()) for pattern in config["rule_files"]]
    (discovery,) = config["scrape_configs"][0]["http_sd_configs"]
    discovery["url"] = discovery["url"].replace("http://127.0.0.1:8000", router)
    (folder / CONFIG.name).write_text(yaml.safe_dump(config))
    address, log = f"127.0.0.1:{free_port()}", folder / "prometheus.log"
    options = (f"--config.file={folder / CONFIG.name}", f"--storage.tsdb.path={folder / 'data'}")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [program, *options, f"--web.listen-address={address}"], stdout=output, stderr=output, cwd=folder
        )
    try:
        _wait_ready(process, f"http://{address}", log)
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        process.wait(30)


def _wait_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if requests.get(url + "/-/ready", timeout=5).status_code == 200:
                return
        except requests.ConnectionError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"Prometheus did not start: {log.read_text()[-2000:]}")
