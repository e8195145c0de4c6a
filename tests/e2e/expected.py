"""All requests that some test compares with plain vLLM, by model."""

from __future__ import annotations

from typing import Any

from tests.e2e.suite import Ask, around_boundaries, chat, completion, conversations, crowd, sampled, tokens


def shared_prefix() -> list[Ask]:
    """Five prompts that begin with the same 200 tokens."""
    return [completion(tokens(200, 21) + tokens(20 + i, 22), 16) for i in range(5)]


def long_answers() -> list[Ask]:
    """Prompts whose answers, together, don't fit into small pools."""
    return [completion(tokens(60 + 7 * i, 31), 150) for i in range(9)]


def long_streams() -> list[Ask]:
    """Answers that take long enough to kill an engine in the middle of them: to ids, and to text in a template."""
    return [completion(tokens(120, 5), 400), chat("Write a long story.", 400)]


def told_streams() -> list[Ask]:
    """As long, with all that a stream can say. The stop strings come at the end of the answers, or never."""
    fields: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": False}
    return [
        chat("Write a long story.", 400, stop=[" abo value", "never, ever"], **fields),
        completion(tokens(120, 5), 400, logprobs=2, **{**fields, "return_token_ids": True}),
        chat("Write a long story.", 400, logprobs=True, top_logprobs=2, **fields),
    ]


def llama() -> list[Ask]:
    return [
        *around_boundaries(seed=1),
        *crowd(seed=2),
        *conversations(),
        *sampled(),
        *shared_prefix(),
        *long_answers(),
        *long_streams(),
    ]


def gemma() -> list[Ask]:
    return [*around_boundaries(seed=3), *crowd(seed=4, count=12)]
