"""A real browser for tests: a headless Chromium, driven over the DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

FETCHED = Path(__file__).parents[2] / ".browser"  # by scripts/browser.sh
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = (
    *("--headless=shell", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--remote-debugging-port=0", "--no-first-run", "--disable-background-networking", "--disable-component-update"),
)
START_SECONDS = 60.0


def find_browser() -> Path | None:
    """TKNP_BROWSER, else the one that `make browser` fetched, else one of this machine's."""
    if named := os.environ.get("TKNP_BROWSER"):
        return Path(named)
    if (FETCHED / "chromium").exists():
        return FETCHED / "chromium"
    return next((Path(found) for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One tab. What goes wrong in it is kept in `complaints`."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._num_sent = 0
        self.complaints: list[str] = []
        self.requested: list[str] = []  # URLs
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """One command; returns its result."""
        self._num_sent += 1
        self._socket.send(json.dumps({"id": self._num_sent, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=START_SECONDS))
            if message.get("id") == self._num_sent:
                assert "error" not in message, (method, message["error"])
                result: dict[str, Any] = message["result"]
                return result
            self._notice(message)

    def _notice(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event["method"] == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif event["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif event["method"] == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise."""
        told = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 20.0) -> None:
        """Until the expression is true."""
        deadline = time.monotonic() + seconds
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, f"{expression} did not become true; the page says: {self.text()}"
            time.sleep(0.05)

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)
        self.wait_for(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def text(self) -> str:
        """What a reader sees."""
        found: str = self.evaluate("document.body.innerText")
        return found

    def resize(self, width: int, height: int) -> None:
        """In CSS pixels."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def prefer(self, scheme: str) -> None:
        """light or dark."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path) -> None:
        """PNG of what the window shows."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def open_browser(program: Path) -> Iterator[Page]:
    """A fresh browser with one empty tab."""
    environment = dict(os.environ)
    if program.parent == FETCHED:  # it brings the libraries and fonts that a bare machine lacks
        environment.update(LD_LIBRARY_PATH=str(FETCHED / "lib"), FONTCONFIG_PATH=str(FETCHED))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        log = Path(profile) / "stderr"
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [program, *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=environment,
            )
        try:
            address = _debugging_address(process, log, Path(profile) / "DevToolsActivePort")
            with connect(address, max_size=2**26) as browser:
                browser.send(json.dumps({"id": 1, "method": "Target.getTargets"}))
                (tab,) = [
                    t for t in json.loads(browser.recv(timeout=30))["result"]["targetInfos"] if t["type"] == "page"
                ]
            with connect(
                address.partition("/devtools")[0] + "/devtools/page/" + tab["targetId"], max_size=2**26
            ) as tab_socket:
                yield Page(tab_socket)
        finally:
            process.kill()
            process.wait(30)


def _debugging_address(process: subprocess.Popen[bytes], log: Path, port_file: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        lines = port_file.read_text().split() if port_file.exists() else []
        if len(lines) == 2:
            return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        time.sleep(0.05)
    raise RuntimeError(f"the browser did not start: {log.read_text(errors='replace')[-2000:]}")
