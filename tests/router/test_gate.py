"""API keys in front of everything but probes, and what nobody gets to see of them."""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from openai import AuthenticationError, OpenAI

from router.callers import ANONYMOUS
from router.errors import Forbidden
from router.gate import admit
from tests.router.conftest import Stack, StartStack
from tests.router.running import wait_for
from tests.router.scripted_engine import MODEL, status

KEY, OTHER, ADMIN, WRONG = "sk-key-0000-aaaa", "sk-key-0000-bbbb", "sk-key-0000-cccc", "sk-key-0000-zzzz"
FILE = f"""
[[keys]]
name = "first"
key = "{KEY}"
[[keys]]
key = "{OTHER}"
[[keys]]
name = "operator"
sha256 = "{hashlib.sha256(ADMIN.encode()).hexdigest()}"
admin = true
"""


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(FILE)
    return path


@pytest.fixture
def locked(start_stack: StartStack, keys_file: Path) -> Iterator[Stack]:
    found = start_stack(api_keys_file=keys_file)
    yield found
    wait_for(found.router.is_idle)


@pytest.mark.parametrize("headers", [{}, bearer(WRONG), {"Authorization": KEY}, {"Api-Key": KEY}, bearer("")])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "//v1/completions", "/health/"])
def test_a_post_without_a_known_key_reaches_nothing(locked: Stack, path: str, headers: dict[str, str]) -> None:
    answer = locked.router.call("POST", path, {"model": MODEL, "prompt": "hi"}, headers)
    assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
    assert answer.error["type"] == "invalid_request_error"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-request-id"]
    assert "sk-key" not in str(answer.body)
    assert locked.num_seen == 0


def test_paths_are_closed_unless_they_are_known_to_be_open(locked: Stack) -> None:
    for path in ("/v1/models", "/metrics", "/requests/x", "/openapi.json", "/nowhere", "/", "/%68ealth/../metrics"):
        assert locked.router.call("GET", path).status == 401, path
        assert locked.router.call("GET", path, headers=bearer(KEY)).status in (200, 404), path
    assert locked.router.call("GET", "/health").status == 200
    assert locked.router.call("GET", "/ready").status == 200


def test_only_admins_change_the_router(locked: Stack) -> None:
    path = f"/admin/engines/{locked.decode[0].name}/drain"
    assert locked.router.call("POST", path).status == 401
    refused = locked.router.call("POST", path, headers=bearer(KEY))
    assert (refused.status, refused.error["code"]) == (403, "forbidden")
    assert locked.router.call("POST", "/admin/nothing", headers=bearer(KEY)).status == 403
    assert locked.router.complete(bearer(KEY)).status == 200
    assert locked.router.call("POST", path, headers=bearer(ADMIN)).status == 200
    assert locked.router.call("POST", path.replace("drain", "resume"), headers=bearer(ADMIN)).status == 200


def basic(key: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"me:{key}".encode()).decode()}


def test_a_browser_may_show_the_key_as_a_password_to_look_and_not_to_ask(locked: Stack) -> None:
    asked = locked.router.call("GET", "/metrics")
    assert "Basic realm=" in asked.headers["www-authenticate"]
    assert locked.router.call("GET", "/metrics", headers=basic(KEY)).status == 200
    assert locked.router.call("GET", "/metrics", headers=basic(WRONG)).status == 401
    for value in ("Basic", "Basic !", "Basic " + base64.b64encode(KEY.encode()).decode()):
        assert locked.router.call("GET", "/metrics", headers={"Authorization": value}).status == 401
    assert locked.router.complete(basic(KEY)).status == 401
    assert locked.num_seen == 0


def test_without_keys_an_admin_s_path_is_for_the_router_s_own_machine() -> None:
    here = {"path": "/admin/x", "client": ("127.0.0.1", 5), "state": {}}
    there = {"path": "/admin/x", "client": ("10.0.0.9", 5), "state": {}}
    router = SimpleNamespace(access=SimpleNamespace(identify=lambda scope: ANONYMOUS))
    app: Any = SimpleNamespace(state=SimpleNamespace(router=router))
    admit({**here, "app": app})
    with pytest.raises(Forbidden, match="own machine"):
        admit({**there, "app": app})


def test_ready_tells_strangers_no_more_than_whether(locked: Stack) -> None:
    assert locked.router.call("GET", "/ready").json() == {"ready": True}
    assert locked.router.call("GET", "/ready", headers=bearer(WRONG)).json() == {"ready": True}
    assert len(locked.router.call("GET", "/ready", headers=bearer(KEY)).json()["engines"]) == 2
    assert locked.router.metric("tknp_unauthorized_requests_total", reason="missing") == 0
    locked.decode[0].kill()
    wait_for(lambda: locked.router.call("GET", "/ready").status == 503)
    assert locked.router.call("GET", "/ready").json() == {"ready": False}


def test_metrics_can_be_opened(start_stack: StartStack, keys_file: Path) -> None:
    stack = start_stack(api_keys_file=keys_file, open_metrics=True)
    assert stack.router.call("GET", "/metrics").status == 200
    assert stack.router.call("GET", "/v1/models").status == 401


def test_refusals_are_counted(locked: Stack) -> None:
    locked.router.complete()
    locked.router.complete(bearer(WRONG))
    locked.router.complete(bearer(WRONG))
    assert locked.router.metric("tknp_unauthorized_requests_total", reason="missing") == 1
    assert locked.router.metric("tknp_unauthorized_requests_total", reason="unknown") == 2


def test_the_official_client_sends_its_key(locked: Stack) -> None:
    with OpenAI(base_url=f"{locked.router.url}/v1", api_key=OTHER, max_retries=0) as client:
        assert client.completions.create(model=MODEL, prompt="hi").choices[0].text
    with OpenAI(base_url=f"{locked.router.url}/v1", api_key=WRONG, max_retries=0) as client:
        with pytest.raises(AuthenticationError, match="not one of this server's"):
            client.completions.create(model=MODEL, prompt="hi")
        with pytest.raises(AuthenticationError):
            client.models.list()


def test_engines_never_see_a_clients_key(locked: Stack) -> None:
    assert locked.router.complete(bearer(KEY)).status == 200
    for engine in (locked.prefill[0], locked.decode[0]):
        assert "authorization" not in engine.seen[0].headers
        assert KEY.encode() not in engine.seen[0].raw


def test_a_record_is_for_the_key_that_made_the_request(locked: Stack) -> None:
    assert locked.router.complete({**bearer(KEY), "X-Request-Id": "mine"}).status == 200
    for key, expected in ((KEY, 200), (ADMIN, 200), (OTHER, 404)):
        assert locked.router.call("GET", "/requests/mine", headers=bearer(key)).status == expected
    hidden = locked.router.call("GET", "/requests/mine", headers=bearer(OTHER)).error["message"]
    absent = locked.router.call("GET", "/requests/none", headers=bearer(OTHER)).error["message"]
    assert hidden.replace("mine", "none") == absent  # nor can one learn that it exists
    told = locked.router.call("GET", "/requests/mine", headers=bearer(KEY)).json()
    assert told["key"] == "first"


def test_keys_are_read_again_without_a_restart(
    locked: Stack, keys_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert locked.router.complete({**bearer(KEY), "X-Request-Id": "before"}).status == 200
    keys_file.write_text("keys = 7")
    wait_for(lambda: "the keys from before stay in use" in caplog.text)
    assert locked.router.complete(bearer(KEY)).status == 200
    replacement = keys_file.with_suffix(".new")
    replacement.write_text(f'[[keys]]\nkey = "{KEY}"\n[[keys]]\nkey = "{WRONG}"')
    replacement.rename(keys_file)
    wait_for(lambda: locked.router.complete(bearer(WRONG)).status == 200)
    assert locked.router.complete(bearer(OTHER)).status == 401
    assert locked.router.call("GET", "/requests/before", headers=bearer(KEY)).status == 200
    keys_file.unlink()
    wait_for(lambda: "can't be read" in caplog.text)
    assert locked.router.complete(bearer(WRONG)).status == 200


def test_no_key_is_ever_shown(locked: Stack, keys_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    shown = []
    for key in (KEY, OTHER, ADMIN, WRONG):
        shown.append(locked.router.complete({**bearer(key), "X-Request-Id": f"r-{key[-1]}"}))
        shown.append(locked.router.complete(bearer(key), temperature=9))
        shown.append(locked.router.call("GET", f"/requests/r-{key[-1]}", headers=bearer(ADMIN)))
    locked.decode[0].behaviour = status(500)
    shown.append(locked.router.complete(bearer(KEY)))
    locked.decode[0].kill()
    shown.append(locked.router.complete(bearer(KEY)))
    keys_file.write_text(FILE.replace('name = "first"', "name = first"))
    wait_for(lambda: "stay in use" in caplog.text)
    shown.append(locked.router.call("GET", "/metrics", headers=bearer(ADMIN)))
    assert shown[-1].status == 200
    assert b'key="first"' in shown[-1].body
    assert b'key="unnamed"' in shown[-1].body
    everything = "".join(f"{r.getMessage()} {r.__dict__}" for r in caplog.records) + "".join(map(str, shown))
    assert "request finished" in everything
    for key in (KEY, OTHER, ADMIN, WRONG):
        assert key not in everything
        assert hashlib.sha256(key.encode()).hexdigest() not in everything


def test_without_a_key_file_everybody_may_ask(start_stack: StartStack) -> None:
    stack = start_stack()
    assert stack.router.complete(bearer(WRONG)).status == 200
    assert stack.router.call("GET", "/metrics").status == 200
    assert stack.router.metric("tknp_unauthorized_requests_total", reason="missing") == 0


ORIGIN = "https://chat.example.org"
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization",
}


def test_pages_of_other_origins_may_not_ask(start_stack: StartStack) -> None:
    stack = start_stack()
    for answer in (
        stack.router.call("OPTIONS", "/v1/completions", headers=PREFLIGHT),
        stack.router.complete({"Origin": ORIGIN}),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_pages_of_the_origins_in_the_settings_may(start_stack: StartStack, keys_file: Path) -> None:
    stack = start_stack(api_keys_file=keys_file, cors_allowed_origins=f"{ORIGIN}, https://b.example.org")
    answer = stack.router.call("OPTIONS", "/v1/completions", headers=PREFLIGHT)
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, ORIGIN)
    assert "authorization" in answer.headers["access-control-allow-headers"].lower()
    answer = stack.router.call(
        "OPTIONS", "/v1/completions", headers={**PREFLIGHT, "Origin": "https://evil.example.org"}
    )
    assert "access-control-allow-origin" not in answer.headers
    refused = stack.router.complete({"Origin": ORIGIN})  # a page can read why
    assert (refused.status, refused.headers["access-control-allow-origin"]) == (401, ORIGIN)
    stream = stack.router.complete({**bearer(KEY), "Origin": ORIGIN}, stream=True)
    assert stream.headers["access-control-allow-origin"] == ORIGIN
    assert "X-Request-Id" in stream.headers["access-control-expose-headers"]
    assert stream.body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("kind", ["setting", "file"])
def test_engines_get_the_key_that_they_were_started_with(start_stack: StartStack, tmp_path: Path, kind: str) -> None:
    (tmp_path / "key").write_text("sk-engine-0001\n")
    given = {"engine_api_key": "sk-engine-0001"} if kind == "setting" else {"engine_api_key_file": tmp_path / "key"}
    stack = start_stack(**given)
    assert stack.router.complete({"Authorization": "Bearer sk-of-the-client"}).status == 200
    for engine in (stack.prefill[0], stack.decode[0]):
        assert engine.seen[0].headers["authorization"] == "Bearer sk-engine-0001"
    assert "sk-engine-0001" not in repr(stack.router.state.settings)
    assert b"sk-engine-0001" not in stack.router.call("GET", "/metrics").body
