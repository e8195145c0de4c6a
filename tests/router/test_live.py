"""The live page: over HTTP, and in a real browser."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Iterator
from typing import Any

import pytest

from router.live import content_policy
from tests.router.browser import FETCHED, Page, find_browser, open_browser
from tests.router.conftest import Stack, StartStack
from tests.router.running import wait_for
from tests.router.scripted_engine import stall
from tests.router.test_guard import GREEDY, RIGHT, alone

EVIL = "<img src=x onerror=alert(1)>\"'&"
AXE = FETCHED / "axe.min.js"


def ranks(*used: tuple[int, int]) -> dict[str, Any]:
    """What a decode engine tells: for each rank its blocks and those of them that are free."""
    told = [
        {"rank": i, "num_blocks": blocks, "num_free_blocks": free, "num_requests": i}
        for i, (blocks, free) in enumerate(used)
    ]
    return {"token_parallel_size": len(told), "efficiency": 0.5, "ranks": told}


def test_the_page_needs_nothing_from_elsewhere(stack: Stack) -> None:
    answer = stack.router.call("GET", "/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "script-src 'sha256-" in answer.headers["content-security-policy"]
    page = answer.body.decode()
    assert not re.findall(r"https?://|src=|@import|innerHTML|insertAdjacentHTML|eval\(|\son\w+=", page)
    assert re.findall(r'href="([^"]*)"', page) == ["data:,", "status"]


def test_the_page_is_in_the_package() -> None:
    page = importlib.resources.files("router").joinpath("live.html").read_bytes()
    assert content_policy(page).count("'sha256-") == 2


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    program = find_browser()
    if program is None:
        pytest.skip("no browser: `make browser` fetches one through npm, or set TKNP_BROWSER to a Chromium")
    with open_browser(program) as page:
        yield page


@pytest.fixture
def page(browser: Page) -> Iterator[Page]:
    browser.complaints.clear()
    browser.requested.clear()
    browser.resize(1200, 900)
    browser.prefer("light")
    yield browser
    browser.open("about:blank")


def busy_stack(start_stack: StartStack, **settings: Any) -> Stack:
    stack = start_stack(num_prefill=2, num_decode=2, **settings)
    for engine, told in zip(stack.decode, (ranks((100, 25), (200, 200)), ranks((50, 0), (50, 10))), strict=True):
        engine.token_parallel = told
    for engine in stack.prefill:
        engine.metrics_text = 'vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.375\n'
    return stack


def test_what_it_shows(start_stack: StartStack, page: Page) -> None:
    stack = busy_stack(start_stack, guard_share=1.0)
    for engine in stack.prefill:
        engine.behaviour = alone([*RIGHT[:2], "x"])
    stack.router.complete({"X-Request-Id": "seen"}, stream=True, **GREEDY)
    stack.prefill[1].kill()
    wait_for(lambda: not stack.router.state.pool.engines[1].is_up)
    stack.decode[0].behaviour = stack.decode[1].behaviour = stall
    held = stack.router.open_stream()
    page.open(stack.router.url + "/")
    page.wait_for("document.body.innerText.includes('different')")
    text = page.text()
    assert "ready" in text
    for engine in stack.prefill + stack.decode:
        assert engine.name in text
    assert "it can't be reached: Connect" in text
    assert "38 %" in text  # the prefill engine's KV
    assert "rank 1" in text
    assert re.search(r"75 %\s*·\s*0 req", text)
    assert re.search(r"seen\s+different\s+4", text)
    assert re.search(r"decode to first token\s+1\b", text)
    meters = page.evaluate("[...document.querySelectorAll('meter')].map(m => m.value)")
    assert sorted(meters) == [0, 0.375, 0.75, 0.8, 1]
    held.close()
    page.wait_for("/decode to first token\\s+0\\b/.test(document.body.innerText)")
    assert page.complaints == []
    assert {url.split("?")[0].removeprefix(stack.router.url) for url in page.requested} <= {"/", "/status", "data:,"}


def test_a_router_that_goes_away_is_told(start_stack: StartStack, page: Page) -> None:
    stack = start_stack()
    page.open(stack.router.url + "/")
    page.wait_for("document.getElementById('state').textContent === 'ready'")
    stack.decode[0].kill()
    page.wait_for("document.getElementById('state').textContent.includes('no decode engine is up')")
    stack.router.server.should_exit = True
    page.wait_for("document.getElementById('state').textContent.startsWith('no news from the router')")


def test_names_from_outside_are_text(start_stack: StartStack, page: Page) -> None:
    stack = start_stack(models_interval=0.1)
    stack.decode[0].models = [{"id": EVIL, "object": "model", "max_model_len": 4096}]
    wait_for(lambda: EVIL in stack.router.state.pool.models())
    page.open(stack.router.url + "/")
    page.wait_for("document.querySelectorAll('#decode li').length > 0")
    assert EVIL in page.text()
    assert page.evaluate("document.images.length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
def test_readable_on_a_phone_and_in_the_dark(start_stack: StartStack, page: Page, scheme: str, width: int) -> None:
    stack = busy_stack(start_stack)
    stack.router.complete(stream=True)
    stack.decode[1].kill()
    page.resize(width, 800)
    page.prefer(scheme)
    page.open(stack.router.url + "/")
    page.wait_for("document.body.innerText.includes('KV transfer') && document.querySelector('.down') !== null")
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "wider than the screen"
    if AXE.exists():
        page.evaluate(AXE.read_text() + "; 0")
        found = page.evaluate(
            "axe.run({resultTypes: ['violations']}).then(r => r.violations.map(v => v.id + ': ' + v.help))"
        )
        assert found == []


def test_engines_are_asked_only_while_somebody_looks(start_stack: StartStack, page: Page) -> None:
    stack = busy_stack(start_stack, kv_poll_interval=600.0)  # which is for choosing engines, and goes on all the time
    page.open("about:blank")
    assert sum(engine.num_looks for engine in stack.prefill + stack.decode) == 0
    page.open(stack.router.url + "/")
    wait_for(lambda: stack.decode[0].num_looks > 1)
