"""Pictures of the dashboards for the docs: `make pictures`. Takes three minutes, two engines, a browser and Prometheus.

The data is a real Prometheus', of real engines under load. What draws it is not Grafana, which can't be had without its
server, but uPlot, which draws Grafana's graphs, on a page that puts the panels where Grafana puts them.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.deploy.dashboards import Asked, boards
from tests.deploy.prometheus import MISSING, ROOT, Prometheus, find_program
from tests.e2e.processes import start_decode, start_prefill
from tests.e2e.stack import running
from tests.e2e.watched import watched
from tests.router.browser import find_browser, open_browser
from tknp.tiny_model import make_tiny_model

SECONDS, STEP = 120, 1
RATE_INTERVAL = "15s"
WIDTH = 1400  # pixels
UPLOT = ("uplot@1.6.32", "4b8a8191e425658e3ea8c8c1314b0fc679c861ee3a1af2b20c7b16ba50b5133d")
PAGE = Path(__file__).with_name("pictures.html")
IMAGES = ROOT / "docs/images"


def fetch_uplot(folder: Path) -> Path:
    """The library's folder dist, from npm, checked."""
    package, digest = UPLOT
    name = subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True)
    archive = folder / name.stdout.strip()
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != digest:
        raise RuntimeError(f"{package} has the SHA-256 {found} and not {digest}")
    subprocess.run(["tar", "-xzf", archive, "-C", folder], check=True)
    return folder / "package/dist"


def read_panel(prometheus: Prometheus, board: str, panel: dict[str, Any], end: float) -> dict[str, Any]:
    """What the page draws of one panel."""
    drawn = {"type": panel["type"], "title": panel["title"], "grid": panel["gridPos"], "series": []}
    if panel["type"] == "row":
        return drawn
    defaults = panel["fieldConfig"]["defaults"]
    drawn["unit"] = defaults["unit"]
    drawn["steps"] = defaults.get("thresholds", {}).get("steps", [])
    drawn["is_stacked"] = defaults.get("custom", {}).get("stacking", {}).get("mode") == "normal"
    for target in panel["targets"]:
        query = Asked(board, panel["title"], target["expr"]).filled(RATE_INTERVAL)
        found = prometheus.get("query_range", query=query, start=end - SECONDS, end=end, step=STEP)["result"]
        for series in found:
            known = {float(when): float(value) for when, value in series["values"]}
            values = [known.get(when) for when in times(end)]
            name = named(target["legendFormat"], series["metric"])
            finite = [None if value is None or value != value else value for value in values]
            drawn["series"].append({"name": name, "values": finite})
    return drawn


def named(legend: str, labels: dict[str, str]) -> str:
    """A line's name: `legend` with the values of the {{labels}} in it."""
    return re.sub(r"{{(\w+)}}", lambda label: labels.get(label[1], ""), legend)


def times(end: float) -> list[float]:
    return [end - SECONDS + STEP * i for i in range(SECONDS // STEP + 1)]


def draw(prometheus: Prometheus, uplot: Path, images: Path) -> None:
    """One PNG for each dashboard."""
    program = find_browser()
    assert program is not None
    template = PAGE.read_text().replace("/*UPLOT_CSS*/", (uplot / "uPlot.min.css").read_text())
    template = template.replace("/*UPLOT_JS*/", (uplot / "uPlot.iife.min.js").read_text())
    end = float(int(time.time()))
    with open_browser(program) as page:
        for board in boards():
            panels = [read_panel(prometheus, board["title"], panel, end) for panel in board["panels"]]
            data = json.dumps({"title": board["title"], "times": times(end), "panels": panels})
            html = uplot / "board.html"
            html.write_text(template.replace("/*BOARD*/", data.replace("<", "\\u003c")))
            page.resize(WIDTH, 400)
            page.open(html.as_uri())
            page.resize(WIDTH, int(page.evaluate("document.documentElement.scrollHeight")))
            assert page.complaints == [], page.complaints
            page.screenshot(images / f"{board['uid']}.png")


def main() -> None:
    if find_program("prometheus") is None or find_browser() is None:
        sys.exit(f"{MISSING.format('prometheus')}; and no browser: `make browser`")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, uplot = make_tiny_model(folder / "model"), fetch_uplot(folder)
        prefill, decode = start_prefill(model, folder), start_decode(model, folder, 2)
        with running(prefill, decode, folder), watched(prefill, decode, folder) as prometheus:
            time.sleep(SECONDS)
            draw(prometheus, uplot, IMAGES)


if __name__ == "__main__":
    main()
