"""Answers in vLLM's form of what the official client asks for, for engines that do as they are told."""

from __future__ import annotations

from typing import Any

import orjson
from aiohttp import web

from router.types import Api, Task
from tests.router.scripted_engine import MODEL, ScriptedEngine, Seen, answer_decode, start_stream

WORDS = ("one ", "two ", "three")


def response_object(status: str, text: str = "") -> dict[str, Any]:
    """A response of the Responses API, as vLLM 0.32 writes it."""
    content: list[dict[str, Any]] = [{"type": "output_text", "text": text, "annotations": [], "logprobs": None}]
    message = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": content}
    usage = {
        "input_tokens": 9,
        "input_tokens_details": {"cached_tokens": 4},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 12,
    }
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "model": MODEL,
        "status": status,
        "output": [message] if text else [],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": usage if text else None,
    }


def event(name: str, **fields: Any) -> bytes:
    data = orjson.dumps({"type": name, "sequence_number": 0, **fields})
    return b"event: %b\ndata: %b\n\n" % (name.encode(), data)


PREAMBLE = event("response.created", response=response_object("in_progress")) + event(
    "response.in_progress", response=response_object("in_progress")
)
DELTAS = [
    event("response.output_text.delta", delta=word, item_id="msg_1", output_index=0, content_index=0, logprobs=[])
    for word in WORDS
]
COMPLETED = event("response.completed", response=response_object("completed", "".join(WORDS)))


async def answer_response(engine: ScriptedEngine, request: web.Request, seen: Seen) -> web.StreamResponse:
    if not seen.body.get("stream"):
        return web.json_response(response_object("completed", "".join(WORDS)))
    response = await start_stream(request)
    for piece in (PREAMBLE, *DELTAS, COMPLETED):
        await response.write(piece)
    return response


async def answer_any(engine: ScriptedEngine, request: web.Request, seen: Seen) -> web.StreamResponse:
    """As a decode engine does: something of the right kind for each path."""
    if seen.path == Api.RESPONSES:
        return await answer_response(engine, request, seen)
    if seen.path in tuple(Task):
        return web.json_response({"tokens": [1], "prompt": "a", "data": []})
    return await answer_decode(engine, request, seen)


def chat_answer(message: dict[str, Any], finish_reason: str = "stop") -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish_reason}
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": 3,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": MODEL,
        "choices": [choice],
        "usage": usage,
    }


def tool_call(arguments: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}, **fields}


def chat_chunk(delta: dict[str, Any], finish_reason: str | None = None, **fields: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    body = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": MODEL, "choices": [choice]}
    return b"data: %b\n\n" % orjson.dumps({**body, **fields})
