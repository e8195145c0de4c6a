from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from router.cached_usage import CachedUsage

PROMPT = {"usage": {"prompt_tokens": 700, "prompt_tokens_details": {"cached_tokens": 700}}}
HARMONY = {"usage": {"input_tokens_details": {"cached_tokens": 700, "cached_tokens_per_turn": [700]}}}
TOLD_HARMONY = {"usage": {"input_tokens_details": {"cached_tokens": 48, "cached_tokens_per_turn": [48]}}}
OTHER: dict[str, Any] = {"text": 'it said "cached_tokens":7', "tools": [{"default": {"cached_tokens": 5}}]}


def corrected(body: dict[str, Any], num_tokens: int | None) -> Any:
    async def run() -> bytes:
        usage = CachedUsage()
        usage.tell(num_tokens)
        return await usage.corrected(orjson.dumps(body))

    return orjson.loads(asyncio.run(run()))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (PROMPT, {"usage": {"prompt_tokens": 700, "prompt_tokens_details": {"cached_tokens": 48}}}),
        (HARMONY, TOLD_HARMONY),
        ({**OTHER, **HARMONY}, {**OTHER, **TOLD_HARMONY}),
        (OTHER, OTHER),
        ({"usage": {"prompt_tokens": 3, "prompt_tokens_details": None}},) * 2,
    ],
)
def test_only_the_usage_changes(body: dict[str, Any], expected: dict[str, Any]) -> None:
    assert corrected(body, 48) == expected
    assert corrected(body, None) == body


def test_an_answer_waits_for_the_figure_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        body = orjson.dumps(PROMPT)
        usage = CachedUsage()
        waiting = asyncio.create_task(usage.corrected(body))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        usage.tell(0)
        assert b'"cached_tokens":0}' in await waiting
        monkeypatch.setattr("router.cached_usage.PATIENCE", 0.01)
        assert await CachedUsage().corrected(body) == body
        assert await CachedUsage().corrected(b"{}") == b"{}"

    asyncio.run(asyncio.wait_for(run(), 10))
