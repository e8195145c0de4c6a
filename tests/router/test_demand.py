from __future__ import annotations

from typing import Any

import pytest

from router.demand import MESSAGE_TOKENS, TokenEstimator, output_budget, prompt_size

TEXT = "x" * 40


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"prompt": TEXT}, (0, 40)),
        ({"prompt": "é" * 40}, (0, 80)),
        ({"prompt": [1, 2, 3]}, (3, 0)),
        ({"prompt": [[1, 2], [3]]}, (3, 0)),
        ({"prompt": [TEXT, "ab"]}, (0, 42)),
        ({"prompt": None, "prompt_embeds": "AAAA"}, (0, 0)),
        ({"messages": [{"role": "user", "content": TEXT}] * 2}, (2 * MESSAGE_TOKENS, 80)),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": TEXT}, {"x": 1}]}]}, (MESSAGE_TOKENS, 40)),
        ({"messages": [{"role": "assistant"}, {"role": "tool", "content": 5}]}, (2 * MESSAGE_TOKENS, 0)),
    ],
)
def test_the_size_of_a_prompt(body: dict[str, Any], expected: tuple[int, int]) -> None:
    assert prompt_size(body) == expected


@pytest.mark.parametrize(
    ("body", "context", "expected"),
    [
        ({"max_tokens": 7}, 1000, 7),
        ({"max_completion_tokens": 8, "max_tokens": 7}, 1000, 8),
        ({}, 1000, 64),
        ({"max_tokens": None}, 120, 20),
        ({"max_tokens": 7}, 90, 0),
        ({"max_tokens": 7}, None, 7),
    ],
)
def test_the_output_budget(body: dict[str, Any], context: int | None, expected: int) -> None:
    assert output_budget(body, num_prompt_tokens=100, context=context, default=64) == expected


def test_the_estimate_learns_from_what_engines_count() -> None:
    estimator = TokenEstimator()
    assert estimator.num_tokens("m", 401) == 101
    for _ in range(200):
        estimator.observe("m", 2000, 1000)
    assert estimator.num_tokens("m", 2000) == pytest.approx(1000, rel=0.01)
    assert estimator.num_tokens("another", 400) == 100
    estimator.observe("m", 0, 5)
    estimator.observe("m", 5, 0)
    for _ in range(1000):
        estimator.observe("m", 1, 10**9)  # nonsense from an engine
    assert estimator.num_tokens("m", 4) <= 16
