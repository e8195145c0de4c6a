from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from router.lifetime import Moment
from router.pod_watch import QUICK_END
from router.settings import RouterSettings
from router.types import Endpoint, Role
from tests.router.api_replay import RECORDING, ApiReplay, version_of
from tests.router.running import RunningRouter, running_router, wait_for
from tests.router.scripted_engine import ScriptedEngine, answer_either, chunk, raw_stream

STREAM = [chunk(index) for index in range(8)]


@dataclass
class Cluster:
    """A router that finds three scripted engines, a, b and c, through the replay."""

    api: ApiReplay
    router: RunningRouter
    engines: dict[str, ScriptedEngine]

    def roles(self) -> dict[str, str]:
        """Engine -> role of all that take requests."""
        names = {engine.url: name for name, engine in self.engines.items()}
        found = self.router.state.pool.engines
        return {names[e.endpoint.url]: e.endpoint.role.value for e in found if e.is_up and not e.is_draining}

    def wait_for(self, **roles: str) -> None:
        wait_for(lambda: self.roles() == roles)

    def faults(self, fault: str) -> float:
        return self.router.metric("tknp_discovery_faults_total", fault=fault)


def write_kubeconfig(path: Path, url: str) -> Path:
    context = {"name": "test", "context": {"cluster": "test", "user": "test", "namespace": "llm"}}
    user = {"name": "test", "user": {"token": "router-token"}}
    cluster = {"name": "test", "cluster": {"server": url}}
    content = {"current-context": "test", "contexts": [context], "users": [user], "clusters": [cluster]}
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def cluster(
    loop_of_engines: asyncio.AbstractEventLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Cluster]:
    engines = {name: ScriptedEngine(loop_of_engines, Role.DECODE) for name in "abc"}
    for engine in engines.values():
        engine.behaviour = answer_either
        engine.revive()
    api = ApiReplay({name: engine.port for name, engine in engines.items()})
    api.start()
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(write_kubeconfig(tmp_path / "config", f"http://127.0.0.1:{api.port}")))
    monkeypatch.setattr("router.pod_watch.BASE_PAUSE", 0.05)
    selectors: dict[str, Any] = {f"kubernetes_selector_{role}": f"role={role}" for role in ("prefill", "decode")}
    try:
        with running_router([], discovery="kubernetes", **selectors) as router:
            yield Cluster(api, router, engines)
            begin = time.monotonic()
        assert time.monotonic() - begin < 5, "a watch kept the router from ending"
    finally:
        api.stop()
        for engine in engines.values():
            engine.kill()


def read_all(raw: socket.socket) -> bytes:
    got = b""
    while not got.endswith(b"0\r\n\r\n") and (part := raw.recv(65536)):
        got += part
    raw.close()
    return got


def test_engines_join_leave_and_change_role_while_requests_run(cluster: Cluster) -> None:
    """The whole recording, and requests all the time from when somebody is there."""
    api, router = cluster.api, cluster.router
    assert router.call("GET", "/ready").status == 503
    api.go_to("a and b are there")
    wait_for(lambda: len(api.calls) >= 4)
    assert cluster.roles() == {}, "pods that are not ready are no engines yet"
    api.go_to("a and b are ready")
    cluster.wait_for(a="prefill", b="decode")
    assert router.complete().status == 200
    api.go_to("c joins")
    cluster.wait_for(a="prefill", b="decode", c="decode")
    api.go_to("c is not ready")
    cluster.wait_for(a="prefill", b="decode")
    api.go_to("c is ready again")
    cluster.wait_for(a="prefill", b="decode", c="decode")

    cluster.engines["c"].behaviour = cluster.engines["b"].behaviour = raw_stream(
        *STREAM, b"data: [DONE]\n\n", then="end", pause=0.1
    )
    streams = [router.open_stream() for _ in range(4)]
    wait_for(lambda: len(cluster.engines["c"].seen) == 2)
    api.go_to("c becomes prefill")
    cluster.wait_for(a="prefill", b="decode")
    cluster.engines["c"].behaviour = cluster.engines["b"].behaviour = answer_either
    for raw in streams:
        assert STREAM[-1] in read_all(raw)
    cluster.wait_for(a="prefill", b="decode", c="prefill")

    api.go_to("a is deleted")
    cluster.wait_for(b="decode", c="prefill")
    api.go_to("a is gone")
    assert router.complete().status == 200
    assert cluster.engines["c"].seen[-1].body["kv_transfer_params"]["do_remote_decode"]
    wait_for(lambda: len(router.state.pool.engines) == 2)
    wait_for(lambda: router.metric("tknp_requests_total", endpoint="/v1/completions", outcome="ok") == 6)
    assert not any(cluster.faults(fault) for fault in ("expired", "refused", "unreachable", "malformed"))


def test_an_engine_that_changes_its_role_ends_its_requests_first(cluster: Cluster) -> None:
    cluster.api.go_to("c is ready again")
    cluster.wait_for(a="prefill", b="decode", c="decode")
    for name in "bc":
        cluster.engines[name].behaviour = raw_stream(*STREAM, b"data: [DONE]\n\n", then="end", pause=0.1)
    streams = [cluster.router.open_stream() for _ in range(2)]
    wait_for(lambda: cluster.engines["c"].seen)
    cluster.api.go_to("c becomes prefill")
    c, records = cluster.engines["c"].url, cluster.router.state.records
    cluster.wait_for(a="prefill", b="decode")
    while cluster.roles() == {"a": "prefill", "b": "decode"}:
        at_c = [record for record in records.in_flight() if record.engine(Role.DECODE) == Endpoint(Role.DECODE, c)]
        time.sleep(0.01)
    assert all(record.last is Moment.LAST_TOKEN for record in at_c), "it prefills while it still decodes"
    for raw in streams:
        assert STREAM[-1] in read_all(raw)
    cluster.wait_for(a="prefill", b="decode", c="prefill")


def test_a_pod_that_both_selectors_match_for_a_moment_keeps_its_role(cluster: Cluster) -> None:
    cluster.api.go_to("c is ready again")
    cluster.wait_for(a="prefill", b="decode", c="decode")
    cluster.api.go_to("c becomes prefill", ("prefill",))
    time.sleep(0.3)
    cluster.wait_for(a="prefill", b="decode", c="decode")
    cluster.api.go_to("c becomes prefill")
    cluster.wait_for(a="prefill", b="decode", c="prefill")


def test_a_watch_that_breaks_off_in_mid_event(cluster: Cluster) -> None:
    api = cluster.api
    api.go_to("a and b are ready")
    cluster.wait_for(a="prefill", b="decode")
    wait_for(lambda: api.num_watching() == 2)
    api.cut_watches(sending=RECORDING["events"]["decode"][3][0])
    api.go_to("c joins")
    cluster.wait_for(a="prefill", b="decode", c="decode")
    assert cluster.faults("unreachable") == 2


def test_a_watch_that_the_server_ends_goes_on_from_the_last_version(cluster: Cluster) -> None:
    api = cluster.api
    wait_for(lambda: api.num_watching() == 2)
    api.go_to("a and b are ready")
    cluster.wait_for(a="prefill", b="decode")
    time.sleep(QUICK_END)
    api.ends_at_once = True
    wait_for(lambda: len([call for call in api.calls if call.version]) >= 4)
    api.ends_at_once = False
    decode = [call.version for call in api.calls if call.role == "decode"]
    listed = json.loads(RECORDING["lists"]["decode"][0])["metadata"]["resourceVersion"]
    (ready,) = RECORDING["events"]["decode"][2]
    assert decode[:3] == [None, listed, str(version_of(ready))], "list, watch from there, and from the last event"


def test_bookmarks_move_the_version_on(cluster: Cluster) -> None:
    api = cluster.api
    api.go_to("c becomes prefill")
    wait_for(lambda: api.num_watching() == 2)
    assert all(call.fields["allowWatchBookmarks"].lower() == "true" for call in api.calls if call.version)
    api.go_to("bookmarks")
    cluster.wait_for(b="decode", c="prefill")
    time.sleep(QUICK_END)
    api.ends_at_once = True
    bookmark = str(version_of(RECORDING["events"]["decode"][-1][-1]))
    wait_for(lambda: [call for call in api.calls if call.version == bookmark and call.role == "decode"])
    api.ends_at_once = False


def test_a_version_that_is_too_old_makes_it_list_again(cluster: Cluster) -> None:
    """410 Gone, as the API server sends it: what left meanwhile is found to be missing."""
    api = cluster.api
    api.go_to("c becomes prefill")
    cluster.wait_for(a="prefill", b="decode", c="prefill")
    wait_for(lambda: api.num_watching() == 2)
    api.stop()
    api.go_to("a is gone")
    api.gone_before = 1000
    api.start()
    cluster.wait_for(b="decode", c="prefill")
    wait_for(lambda: cluster.faults("expired") >= 3)
    num_calls, begin = len(api.calls), time.monotonic()
    time.sleep(1)
    assert len(api.calls) - num_calls < 60 * (time.monotonic() - begin), "it asks without a pause"
    api.gone_before = 0
    wait_for(lambda: api.num_watching() == 2)


@pytest.mark.parametrize(
    "line",
    [
        "{not json",
        "{}",
        "[]",
        "null",
        '{"type":"ADDED","object":null}',
        '{"type":"ADDED","object":{"metadata":{}}}',
        '{"type":"MODIFIED","object":{"metadata":{"name":"b"},"status":{"conditions":"x"}}}',
        '{"type":"SOMETHING","object":{"metadata":{"name":"b"}}}',
        '{"type":"ERROR","object":{}}',
        '{"type":"ERROR","object":{"kind":"Status","code":500,"reason":"InternalError","message":"etcd"}}',
    ],
)
def test_events_that_make_no_sense(cluster: Cluster, line: str) -> None:
    """It lists again, and no engine is lost over it."""
    api = cluster.api
    api.go_to("a and b are ready")
    cluster.wait_for(a="prefill", b="decode")
    wait_for(lambda: api.num_watching() == 2)
    api.say(line)
    wait_for(lambda: cluster.faults("malformed") + cluster.faults("refused") >= 2)
    assert cluster.roles() == {"a": "prefill", "b": "decode"}
    api.go_to("c joins")
    cluster.wait_for(a="prefill", b="decode", c="decode")


@pytest.mark.parametrize("name", ["forbidden", "unauthorized"])
def test_a_refusal_is_said_in_one_sentence(cluster: Cluster, name: str, caplog: pytest.LogCaptureFixture) -> None:
    api = cluster.api
    api.go_to("a and b are ready")
    cluster.wait_for(a="prefill", b="decode")
    refused = RECORDING["refused"][name]
    api.answers.extend([(refused["status"], refused["body"])] * 2)
    wait_for(lambda: api.num_watching() == 2)
    api.cut_watches()
    wait_for(lambda: cluster.faults("refused") == 2)
    assert f"refuses with status {refused['status']}: the router's service account needs a Role" in caplog.text
    assert cluster.roles() == {"a": "prefill", "b": "decode"}
    wait_for(lambda: api.num_watching() == 2)


def test_lists_that_are_no_lists(cluster: Cluster) -> None:
    api = cluster.api
    api.go_to("a and b are ready")
    cluster.wait_for(a="prefill", b="decode")
    wait_for(lambda: api.num_watching() == 2)
    api.answers.extend([(200, "<html>"), (200, "{}"), (500, ""), (200, '{"metadata":{"resourceVersion":"1"}}')])
    api.cut_watches()
    wait_for(lambda: not api.answers and api.num_watching() == 2)
    assert cluster.roles() == {"a": "prefill", "b": "decode"}


def test_events_that_come_in_small_pieces_hold_nothing_up(cluster: Cluster) -> None:
    api = cluster.api
    api.go_to("a and b are ready")
    cluster.wait_for(a="prefill", b="decode")
    api.pause = 0.1
    api.go_to("c joins")
    slowest = 0.0
    while "c" not in cluster.roles():
        begin = time.monotonic()
        assert cluster.router.call("GET", "/health").status == 200
        slowest = max(slowest, time.monotonic() - begin)
    assert slowest < 0.5, "the event loop waited for the API server"


def test_while_the_api_server_is_away_engines_stay(cluster: Cluster) -> None:
    api = cluster.api
    api.go_to("a and b are ready")
    cluster.wait_for(a="prefill", b="decode")
    api.stop()
    wait_for(lambda: cluster.faults("unreachable") >= 4)
    assert cluster.router.complete().status == 200
    api.go_to("c joins")
    api.start()
    cluster.wait_for(a="prefill", b="decode", c="decode")


def test_a_connection_that_was_lost_in_silence(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a proxy forgot it: nothing comes any more, and nothing says so."""
    api = cluster.api
    monkeypatch.setattr("router.pod_watch.WATCH_SECONDS", 1)
    monkeypatch.setattr("router.pod_watch.LATE_SECONDS", 0.2)
    api.go_to("a and b are ready")
    cluster.wait_for(a="prefill", b="decode")
    wait_for(lambda: api.num_watching() == 2)
    api.cut_watches()  # those of now began with the limit of before
    api.is_mute = True
    wait_for(lambda: cluster.faults("unreachable") >= 4)
    api.is_mute = False
    api.go_to("c joins")
    cluster.wait_for(a="prefill", b="decode", c="decode")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"discovery": "kubernetes"}, "needs --kubernetes-selector-decode"),
        ({"kubernetes_selector_decode": "a=b"}, "need --discovery kubernetes"),
        ({"discovery": "file"}, "go together"),
        (
            {"discovery": "kubernetes", "kubernetes_selector_decode": "a=b", "decode_urls": "http://a:1"},
            "for --discovery",
        ),
        ({"discovery": "kubernetes", "kubernetes_selector_decode": "a=b"}, "finds no way to the API server"),
    ],
)
def test_settings_that_can_not_be(
    fields: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=said):
        RouterSettings(**fields)
