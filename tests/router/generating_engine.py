"""A behaviour for scripted engines: generates like an engine whose model is a formula, and can die on the way.

The next token depends on all before it, prompt included, so a continuation from anything but prompt + tokens so far
gives other tokens.
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from aiohttp import web

from tests.router.scripted_engine import MODEL, Behaviour, ScriptedEngine, Seen, start_stream


def next_token(ids: list[int]) -> int:
    """A letter."""
    return 97 + sum(i * token for i, token in enumerate(ids, 1)) % 26


def prompt_ids(path: str, body: dict[str, Any]) -> list[int]:
    prompt = body["messages"][-1]["content"] if path.endswith("chat/completions") else body["prompt"]
    return [ord(char) for char in prompt] if isinstance(prompt, str) else list(prompt)


def answer_of(prompt: list[int], max_tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(max_tokens):
        ids.append(next_token(ids))
    return ids[len(prompt) :]


def events_of(path: str, body: dict[str, Any], stream_id: str) -> list[bytes]:
    """The stream as vLLM would send it (exclude_unset=True: fields that were set to None are there, as null)."""
    prompt = prompt_ids(path, body)
    is_chat = path.endswith("chat/completions")
    wants_ids = body.get("return_token_ids")
    max_tokens = body.get("max_completion_tokens") or body.get("max_tokens") or 16
    kind = "chat.completion.chunk" if is_chat else "text_completion"
    common = {"id": stream_id, "object": kind, "created": int(stream_id[-3:]), "model": MODEL}
    events: list[dict[str, Any]] = []
    if is_chat:
        role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        events.append({**common, "choices": [role], "prompt_token_ids": prompt if wants_ids else None})
    tokens = answer_of(prompt, max_tokens)
    for i, token in enumerate(tokens):
        finish = "length" if i == len(tokens) - 1 else None
        text = {"delta": {"content": chr(token)}} if is_chat else {"text": chr(token)}
        choice: dict[str, Any] = {"index": 0, **text, "logprobs": None, "finish_reason": finish}
        if not is_chat:
            choice["prompt_token_ids"] = prompt if wants_ids and i == 0 else None
        choice["token_ids"] = [token] if wants_ids else None
        events.append({**common, "choices": [choice]})
    if (body.get("stream_options") or {}).get("include_usage"):
        usage = {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(tokens),
            "total_tokens": len(prompt) + len(tokens),
        }
        events.append({**common, "choices": [], "usage": usage})
    return [b"data: " + orjson.dumps(event) + b"\n\n" for event in events] + [b"data: [DONE]\n\n"]


def generate(stream_id: str, die_after: int | None = None, pause: float = 0.0) -> Behaviour:
    """Streams; breaks the connection after `die_after` events."""

    async def answer(engine: ScriptedEngine, request: web.Request, seen: Seen) -> web.StreamResponse:
        response = await start_stream(request)
        for i, event in enumerate(events_of(seen.path, seen.body, stream_id)):
            if i == die_after:
                await asyncio.sleep(0.05)  # what was written is on its way before the connection breaks
                assert request.transport is not None
                request.transport.abort()
                return response
            await response.write(event)
            await asyncio.sleep(pause)
        return response

    return answer
