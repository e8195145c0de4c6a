"""The requests whose answers must be plain vLLM's, token for token."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tests.e2e.processes import Service

BLOCK = 32
_VOCABULARY = range(5, 455)  # ids of the tiny models' tokenizer that are not special


@dataclass(frozen=True)
class Ask:
    """One request."""

    path: str
    body: dict[str, Any]


def tokens(count: int, seed: int) -> list[int]:
    """A prompt of `count` random tokens."""
    return random.Random(f"{seed}/{count}").choices(_VOCABULARY, k=count)


def completion(prompt: list[int], max_tokens: int, **fields: Any) -> Ask:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "return_token_ids": True, **fields}
    return Ask("/v1/completions", {"temperature": 0, "ignore_eos": True, **body})


def chat(text: str, max_tokens: int, **fields: Any) -> Ask:
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, **fields}
    return Ask("/v1/chat/completions", {"temperature": 0, "ignore_eos": True, "return_token_ids": True, **body})


def around_boundaries(seed: int) -> list[Ask]:
    """Prompts of one token, just under, at and over the ends of blocks and of prefill chunks, and of many chunks."""
    lengths = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 4 * BLOCK, 301, 700]
    return [completion(tokens(n, seed), 24) for n in lengths]


def crowd(seed: int, count: int = 32) -> list[Ask]:
    """Requests of mixed length, for sending at once: the batch grows and shrinks. Every eighth prompt is one token:
    such a request is placed twice, once before its KV is pulled and once after, with other loads."""
    rng = random.Random(seed)
    lengths = [1 if i % 8 == 0 else rng.randint(1, 400) for i in range(count)]
    return [completion(tokens(n, seed * 1000 + i), rng.randint(4, 70)) for i, n in enumerate(lengths)]


def conversations() -> list[Ask]:
    return [chat(text, 20) for text in ("Hello!", "What is the capital of France?", "Write a short story. " * 12)]


def sampled() -> list[Ask]:
    """With a seed, sampling must give plain vLLM's tokens too, for each of several sequences.

    All sequences together fit into one prefill chunk: vLLM 0.32.0 on CPU dies of a seeded request whose prefill is
    chunked.
    """
    return [
        completion(tokens(50, 5), 16, temperature=0.8, seed=11),
        completion(tokens(20, 6), 12, temperature=0.9, seed=7, n=3),
        completion(tokens(40, 7), 40, stop=["e"], logprobs=2),
    ]


def answer(service: Service, ask: Ask) -> list[list[int]]:
    """The token ids of each choice."""
    reply = service.post(ask.path, ask.body)
    assert reply.status_code == 200, reply.text
    choices = sorted(reply.json()["choices"], key=lambda choice: choice["index"])
    return [choice["token_ids"] for choice in choices]


def answer_streamed(service: Service, ask: Ask) -> list[list[int]]:
    """As `answer`, streamed."""
    collected: dict[int, list[int]] = {}
    with service.post(ask.path, {**ask.body, "stream": True}, stream=True) as reply:
        assert reply.status_code == 200, reply.text
        events = [line.removeprefix(b"data: ") for line in reply.iter_lines() if line.startswith(b"data: ")]
    assert events[-1] == b"[DONE]"
    for event in events[:-1]:
        for choice in json.loads(event)["choices"]:
            collected.setdefault(choice["index"], []).extend(choice.get("token_ids") or [])
    return [collected[index] for index in sorted(collected)]


@dataclass
class Streamed:
    """All that a stream of one choice says."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)
    end: tuple[Any, Any] = (None, None)  # finish_reason and stop_reason
    usage: dict[str, Any] = field(default_factory=dict)


def streamed(service: Service, ask: Ask) -> Streamed:
    """The answer to a completion or chat that asks for a stream with its usage."""
    got = Streamed()
    with service.post(ask.path, ask.body, stream=True) as reply:
        assert reply.status_code == 200, reply.text
        events = [line.removeprefix(b"data: ") for line in reply.iter_lines() if line.startswith(b"data: ")]
    assert events[-1] == b"[DONE]", events[-1]
    for event in map(json.loads, events[:-1]):
        got.usage = event.get("usage") or got.usage
        for choice in event["choices"]:
            got.text += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            got.token_ids += choice.get("token_ids") or []
            if choice["finish_reason"] is not None:
                got.end = choice["finish_reason"], choice.get("stop_reason")
            told = choice.get("logprobs") or {}
            got.text_offset += told.get("text_offset", ())
            content = told.get("content", ())
            got.tokens += [entry["token"] for entry in content] or told.get("tokens", ())
            got.logprobs += [entry["logprob"] for entry in content] or told.get("token_logprobs", ())
    return got


def answers(service: Service, asks: Sequence[Ask], at_once: int) -> list[list[list[int]]]:
    """The answers to all, of which `at_once` are under way together; seeded ones go alone (see `sampled`)."""
    if any("seed" in ask.body for ask in asks):
        seeded = [answer(service, ask) if "seed" in ask.body else [] for ask in asks]
        others = iter(answers(service, [ask for ask in asks if "seed" not in ask.body], at_once))
        return [known or next(others) for known in seeded]
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda ask: answer(service, ask), asks))
