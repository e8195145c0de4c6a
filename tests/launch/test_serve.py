"""The supervisor over real processes that behave badly when told to."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.launch.launched import Supervised, is_alive, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Supervised]]:
    started: list[Supervised] = []

    def start(*, router: str = "", prefill: str = "", decodes: tuple[str, ...] = ("",), **env: str) -> Supervised:
        children = [("router", "router", router), ("prefill-0", "prefill", prefill)]
        children += [(f"decode-{index}", "decode", behaviour) for index, behaviour in enumerate(decodes)]
        resolved = [(n, r, b.replace("grandchild", f"grandchild={tmp_path / n}.pids")) for n, r, b in children]
        started.append(Supervised(tmp_path, resolved, **env))
        return started[-1]

    yield start
    for supervised in started:
        supervised.process.kill()
        supervised.process.wait()


def test_it_shows_stages_an_answer_and_its_path_and_stops_on_sigint(launch: Callable[..., Supervised]) -> None:
    supervised = launch()
    supervised.wait_until_serving()
    supervised.process.send_signal(signal.SIGINT)
    assert supervised.wait() == 0
    output = supervised.output
    assert "decode-0: starting Python" in output
    assert "decode-0: ready" in output
    assert str(supervised.folder / "prefill-0.log") in output
    assert "It is Paris.\n" in output
    assert "prefill on a:1: 12.5 ms" in output
    assert "KV cache to rank 1: 131,072 bytes (0.12 MiB) in 2.0 ms" in output
    assert "decode on b:2, rank 1: first token after 30.0 ms, the others in 200.0 ms" in output
    assert """-d '{"model": "toy",""" in output
    assert "Traceback" not in output
    for name in supervised.names:
        assert "stopped in order" in (supervised.folder / f"{name}.log").read_text()


def test_the_first_request_waits_until_the_router_knows_every_engine(launch: Callable[..., Supervised]) -> None:
    supervised = launch(router="prefill-late")
    wait_for(lambda: "decode-0: ready" in supervised.output, "the engine")
    assert "router: ready" not in supervised.output
    supervised.wait_until_serving()
    output = supervised.output
    assert output.index("prefill-0: ready") < output.index("router: ready") < output.index("A first request")


def test_a_model_without_a_chat_template_is_asked_to_complete(launch: Callable[..., Supervised]) -> None:
    supervised = launch(router="no-chat-template")
    supervised.wait_until_serving()
    assert "/v1/completions -H" in supervised.output


def test_an_engine_that_dies_at_start_says_why_and_ends_all(launch: Callable[..., Supervised]) -> None:
    supervised = launch(prefill="grandchild,never-ready", decodes=("raises",))
    assert supervised.wait() == 1
    output = supervised.output
    assert "decode-0 ended with exit code 1" in output
    assert "ValueError: the model is too large for this machine" in output
    assert "Traceback" not in output
    assert not any(map(is_alive, supervised.pids("prefill-0")))


def test_the_time_to_start_is_limited(launch: Callable[..., Supervised]) -> None:
    supervised = launch(prefill="never-ready", STARTUP_TIMEOUT="3")
    assert supervised.wait() == 1
    assert "prefill-0: still starting Python" in supervised.output


def test_it_goes_on_while_every_role_has_an_engine(launch: Callable[..., Supervised]) -> None:
    supervised = launch(decodes=("grandchild", "grandchild"))
    supervised.wait_until_serving()
    child, grandchild = supervised.pids("decode-0")
    os.kill(child, signal.SIGKILL)
    wait_for(lambda: "Going on with router, prefill-0, decode-1" in supervised.output, "the news")
    assert "decode-0 ended by signal 9" in supervised.output
    wait_for(lambda: not is_alive(grandchild), "the grandchild's end")
    os.kill(supervised.pids("decode-1")[0], signal.SIGKILL)
    assert supervised.wait() == 1
    assert "no decode engine is left" in supervised.output


def test_it_ends_with_the_router(launch: Callable[..., Supervised]) -> None:
    supervised = launch(router="grandchild")
    supervised.wait_until_serving()
    os.kill(supervised.pids("router")[0], signal.SIGKILL)
    assert supervised.wait() == 1
    assert "the router is gone" in supervised.output


def test_a_second_signal_ends_what_is_deaf_to_the_first(launch: Callable[..., Supervised]) -> None:
    supervised = launch(decodes=("deaf,grandchild",))
    supervised.wait_until_serving()
    supervised.process.send_signal(signal.SIGTERM)
    wait_for(lambda: "Stopping router" in supervised.output, "the first signal's effect")
    # The router, which stops at once, goes first; the engines' turn comes after it.
    wait_for(
        lambda: "stopped in order" in (supervised.folder / "prefill-0.log").read_text(), "the prefill engine's end"
    )
    supervised.process.send_signal(signal.SIGTERM)
    assert supervised.wait() == 0
    assert not any(map(is_alive, supervised.pids("decode-0")))


def test_even_sigkill_leaves_nothing_behind(launch: Callable[..., Supervised]) -> None:
    supervised = launch(prefill="grandchild", decodes=("grandchild",))
    supervised.wait_until_serving()
    pids = supervised.pids("prefill-0") + supervised.pids("decode-0")
    assert all(map(is_alive, pids))
    supervised.process.kill()
    wait_for(lambda: not any(map(is_alive, pids)), "the end of all descendants")


def test_a_killed_guard_leaves_nothing_behind(launch: Callable[..., Supervised]) -> None:
    supervised = launch(decodes=("grandchild",))
    supervised.wait_until_serving()
    child, _ = supervised.pids("decode-0")
    guard = int((Path("/proc") / str(child) / "stat").read_text().rpartition(")")[2].split()[1])
    os.kill(guard, signal.SIGKILL)
    assert supervised.wait() == 1
    assert not is_alive(child)
