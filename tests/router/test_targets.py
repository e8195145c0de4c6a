"""What Prometheus is told to scrape."""

from __future__ import annotations

from pathlib import Path

from tests.router.conftest import StartStack
from tests.router.running import wait_for


def test_the_router_and_all_engines_are_targets(start_stack: StartStack) -> None:
    stack = start_stack(num_prefill=2, num_decode=1)
    stack.prefill[1].kill()
    wait_for(lambda: not stack.router.state.pool.engines[1].is_up)
    told = stack.router.call("GET", "/metrics/targets").json()
    assert [(entry["labels"]["component"], entry["targets"]) for entry in told] == [
        ("router", [stack.router.url.removeprefix("http://")]),
        ("prefill", [stack.prefill[0].name]),
        ("prefill", [stack.prefill[1].name]),
        ("decode", [stack.decode[0].name]),
    ]
    assert {entry["labels"]["__scheme__"] for entry in told} == {"http"}


def test_they_are_as_open_as_the_metrics(start_stack: StartStack, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-key-that-is-long-enough\n")
    for is_open, status in ((False, 401), (True, 200)):
        stack = start_stack(api_keys_file=keys, open_metrics=is_open)
        assert [stack.router.call("GET", path).status for path in ("/metrics", "/metrics/targets")] == [status] * 2
