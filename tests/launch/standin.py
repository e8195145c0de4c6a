"""Stands in for an engine or the router where a real one can't be made to misbehave on demand.

standin.py <port> [behaviour...]
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
RECORD: dict[str, Any] = {
    "attempts": [{"role": "prefill", "engine": "a:1"}, {"role": "decode", "engine": "b:2"}],
    "phases": {"prefill": 0.0125, "transfer": 0.002, "first_token": 0.03, "decode": 0.2, "total": 0.25},
    "kv_transfer": {"rank": 1, "kv_bytes": 131072, "num_transfers": 1, "hidden_bytes": 0},
}
EVENTS = [{"choices": [{"delta": {"content": piece}}]} for piece in ("It is ", "Paris.")]
# A grandchild that no signal but SIGKILL ends, in a session of its own.
STUBBORN = """
import signal, time
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
print("up", flush=True)
time.sleep(600)
"""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body: dict[str, Any] = dict(RECORD) if self.path.startswith("/requests/") else {"data": [{"id": "toy"}]}
        if "prefill-late" in sys.argv:
            body["engines"] = [{"up": True}, {"up": time.monotonic() > STARTED + 3}]
        self._reply(json.dumps(body))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if "no-chat-template" in sys.argv and self.path == "/v1/chat/completions":
            self._reply('{"error": {"message": "no chat template"}}', 400)
            return
        self._reply("".join(f"data: {json.dumps(event)}\n\n" for event in EVENTS) + "data: [DONE]\n\n")

    def _reply(self, text: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("X-Request-Id", "req-1")
        self.send_header("Content-Type", "application/json" if text.startswith("{") else "text/event-stream")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    port, *behaviours = sys.argv[1:]
    if "raises" in behaviours:
        print("(APIServer pid=7) INFO 11-20 12:43:56 [api_utils.py:286] non-default args: {}", flush=True)
        raise ValueError("the model is too large for this machine")
    if "deaf" in behaviours:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    for behaviour in behaviours:
        if behaviour.startswith("grandchild="):
            grandchild = subprocess.Popen(
                [sys.executable, "-c", STUBBORN], start_new_session=True, stdout=subprocess.PIPE
            )
            assert grandchild.stdout is not None
            grandchild.stdout.readline()
            pids = Path(behaviour.removeprefix("grandchild="))
            pids.with_suffix(".tmp").write_text(f"{os.getpid()} {grandchild.pid}")
            pids.with_suffix(".tmp").rename(pids)
    if "never-ready" in behaviours:
        time.sleep(600)
    server = ThreadingHTTPServer(("127.0.0.1", int(port)), Handler)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("stopped in order", flush=True)


main()
