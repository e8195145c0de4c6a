"""Records what a real API server sends while engines come and go, for tests/router/api_replay.py to send again.

python -m tests.kubernetes.record     writes tests/router/api_recording.json; needs `make test-kubernetes` once
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import urllib3

from tests.kubernetes.api_server import ADMIN, NAMESPACE, ROUTER, ApiServer, Cluster, running_api_server

OUTPUT = Path(__file__).parents[1] / "router" / "api_recording.json"
PORTS = {"a": 18101, "b": 18102, "c": 18103}  # stand-ins, which the replay replaces by the ports of its engines
QUIET = 0.5  # s that nothing comes until a step is over
BOOKMARKS = 75  # s of the watches at the end: a bookmark comes about once a minute


class Recorder:
    """One role's list and watch."""

    def __init__(self, api_server: ApiServer, role: str) -> None:
        self._http = urllib3.PoolManager(ca_certs=str(api_server.ca))
        self._url = f"{api_server.url}/api/v1/namespaces/%s/pods"
        self._role = role
        self.lists: list[str] = []
        self.lines: list[str] = []

    def get(self, token: str = ROUTER, *, namespace: str = NAMESPACE, stream: bool = False, **fields: Any) -> Any:
        headers = {"Authorization": f"Bearer {token}"}
        fields = {"labelSelector": f"role={self._role}", **fields}
        url, timeout = self._url % namespace, BOOKMARKS + 30
        return self._http.request(
            "GET", url, fields=fields, headers=headers, preload_content=not stream, timeout=timeout
        )

    def follow(self) -> None:
        version = json.loads(self.get().data)["metadata"]["resourceVersion"]
        response = self.get(
            stream=True, watch="true", allowWatchBookmarks="true", resourceVersion=version, timeoutSeconds=BOOKMARKS
        )
        threading.Thread(target=self._read, args=(response,), daemon=True).start()

    def _read(self, response: Any) -> None:
        rest = b""
        for part in response.stream(None):
            *lines, rest = (rest + part).split(b"\n")
            self.lines += [line.decode() for line in lines]


def record_life(api_server: ApiServer) -> dict[str, Any]:
    cluster = Cluster(api_server)
    cluster.prepare()
    recorders = {role: Recorder(api_server, role) for role in ("prefill", "decode")}
    for recorder in recorders.values():
        recorder.follow()
    create, set_ready = cluster.create, cluster.set_ready
    steps: dict[str, list[partial[None]]] = {
        "nothing": [],
        "a and b are there": [
            partial(create, "a", "prefill", PORTS["a"]),
            partial(create, "b", "decode", PORTS["b"]),
        ],
        "a and b are ready": [partial(set_ready, "a"), partial(set_ready, "b")],
        "c joins": [partial(create, "c", "decode", PORTS["c"]), partial(set_ready, "c")],
        "c is not ready": [partial(set_ready, "c", False)],
        "c is ready again": [partial(set_ready, "c")],
        "c becomes prefill": [partial(cluster.relabel, "c", "prefill")],
        "a is deleted": [partial(cluster.delete, "a")],
        "a is gone": [partial(cluster.bury, "a")],
    }
    events: dict[str, list[list[str]]] = {role: [] for role in recorders}
    for calls in steps.values():
        for call in calls:
            call()
        time.sleep(QUIET)
        for role, recorder in recorders.items():
            recorder.lists.append(recorder.get().data.decode())
            events[role].append(recorder.lines.copy())
            recorder.lines.clear()
    print(f"Waiting {BOOKMARKS} s for bookmarks")
    time.sleep(BOOKMARKS)
    for role, recorder in recorders.items():
        events[role].append(recorder.lines.copy())
        recorder.lists.append(recorder.get().data.decode())
    refused = {
        "forbidden": recorders["decode"].get(namespace="other"),
        "unauthorized": recorders["decode"].get("wrong"),
    }
    return {
        "ports": PORTS,
        "steps": [*steps, "bookmarks"],
        "lists": {role: recorder.lists for role, recorder in recorders.items()},
        "events": events,
        "refused": {name: {"status": a.status, "body": a.data.decode()} for name, a in refused.items()},
    }


def record_gone(api_server: ApiServer) -> dict[str, Any]:
    cluster = Cluster(api_server)
    cluster.prepare()
    cluster.create("a", "prefill", PORTS["a"])
    cluster.set_ready("a")
    api_server.forget_history()
    answer = Recorder(api_server, "prefill").get(ADMIN, watch="true", resourceVersion="1", timeoutSeconds=5)
    return {"status": answer.status, "body": answer.data.decode()}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, running_api_server(Path(folder)) as api_server:
        recording = record_life(api_server)
    with tempfile.TemporaryDirectory() as folder, running_api_server(Path(folder), watch_cache=False) as api_server:
        recording["gone"] = record_gone(api_server)
    OUTPUT.write_text(json.dumps(recording, indent=1) + "\n")
    print(f"Wrote {OUTPUT}")


if __name__ == "__main__":
    main()
