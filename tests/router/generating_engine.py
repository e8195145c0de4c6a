"""A behaviour for scripted engines: generates like an engine whose model is a formula, and can die on the way.

The next token depends on all before it, prompt included, so a continuation from anything but prompt + tokens so far
gives other tokens. Text is told as vLLM tells it: what may become a stop string is held back, so is a character that is
not whole, and a detokenizer whose prompt ends within a character gives the prompt's text too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import orjson
from aiohttp import web

from router.types import Task
from tests.router.scripted_engine import MODEL, Behaviour, ScriptedEngine, Seen, start_stream

BYTES = 0x1000  # tokens from here on are single bytes; those below are characters
EURO = [BYTES + byte for byte in "€".encode()]
SPECIAL = 0xF00  # a token without text in an answer, as tokenizers have them; where text is asked for, it has some
REPLACEMENT = "\ufffd"


def next_token(ids: list[int]) -> int:
    """A letter; after a prompt with an e acute, now and then the euro sign in three tokens, and after one with an o
    slash now and then a special token."""
    if ids[-1] in EURO[:2]:
        return EURO[EURO.index(ids[-1]) + 1]
    drawn = crc32(orjson.dumps(ids))
    if ord("ø") in ids and drawn % 4 == 0:
        return SPECIAL
    return EURO[0] if ord("é") in ids and drawn % 3 == 0 else 97 + drawn % 26


def decode(ids: list[int]) -> str:
    return b"".join(map(_bytes_of, ids)).decode(errors="replace")


def _bytes_of(token: int) -> bytes:
    if token == SPECIAL:
        return b"<|special|>"
    return bytes([token - BYTES]) if token >= BYTES else chr(token).encode()


def _shown(ids: list[int]) -> str:
    return decode([token for token in ids if token != SPECIAL])


def prompt_ids(path: str, body: dict[str, Any]) -> list[int]:
    prompt = body["messages"][-1]["content"] if path.endswith("chat/completions") else body["prompt"]
    if isinstance(prompt, list) and isinstance(prompt[0], str):
        (prompt,) = prompt
    return [ord(char) for char in prompt] if isinstance(prompt, str) else list(prompt)


def answer_of(prompt: list[int], max_tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(max_tokens):
        ids.append(next_token(ids))
    return ids[len(prompt) :]


@dataclass
class Step:
    token: int
    text: str
    finish_reason: str | None = None
    stop_reason: str | int | None = None


def steps(prompt: list[int], body: dict[str, Any]) -> Iterator[Step]:
    """One a token, with the text that vLLM's detokenizer gives for it."""
    ids, known = list(prompt), _shown(prompt)
    known = "" if known.endswith(REPLACEMENT) else known
    stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop") or []
    shows_stop = body.get("include_stop_str_in_output")
    num_held = max(map(len, stops), default=1) - 1 if not shows_stop else 0
    max_tokens = body.get("max_completion_tokens") or body.get("max_tokens") or 16
    answer, num_sent = "", 0
    for number in range(1, max_tokens + 1):
        token = next_token(ids)
        ids.append(token)
        step = Step(token, "", "length" if number == max_tokens else None)
        before, whole = len(answer), _shown(ids)
        can_stop = number > body.get("min_tokens", 0)
        if can_stop and token in body.get("stop_token_ids", ()):
            step.finish_reason, step.stop_reason = "stop", token
        if not whole.endswith(REPLACEMENT) and (step.finish_reason != "stop" or shows_stop):
            answer, known = answer + whole[len(known) :], whole
        places = [(answer.find(s, max(0, before + 1 - len(s))), s) for s in stops if can_stop and len(answer) > before]
        if found := min((p for p in places if p[0] >= 0), key=lambda p: p[0] + len(p[1]), default=None):
            step.finish_reason, step.stop_reason = "stop", found[1]
            answer = answer[: found[0] + len(found[1]) * bool(shows_stop)]
        end = len(answer) if step.finish_reason else max(num_sent, len(answer) - num_held)
        step.text, num_sent = answer[num_sent:end], end
        yield step
        if step.finish_reason:
            return


def alternatives(token: int, count: int) -> list[tuple[str, float]]:
    """The sampled token first, as vLLM has them."""
    return [(decode([token + i]), -0.25 * (i + token % 5)) for i in range(count)]


def logprob(token: str, value: float) -> dict[str, Any]:
    return {"token": token, "logprob": value, "bytes": list(token.encode())}


def logprobs_of(token: int, body: dict[str, Any], is_chat: bool, offset: int) -> dict[str, Any] | None:
    if is_chat and body.get("logprobs"):
        top = [logprob(*a) for a in alternatives(token, body.get("top_logprobs", 0))]
        return {"content": [{**logprob(*alternatives(token, 1)[0]), "top_logprobs": top}]}
    if not is_chat and body.get("logprobs") is not None:
        top_values = dict(alternatives(token, max(1, body["logprobs"])))
        ((text, value),) = alternatives(token, 1)
        return {"text_offset": [offset], "token_logprobs": [value], "tokens": [text], "top_logprobs": [top_values]}
    return None


def events_of(path: str, body: dict[str, Any], stream_id: str) -> list[bytes]:
    """The stream as vLLM would send it (exclude_unset=True: fields that were set to None are there, as null)."""
    prompt = prompt_ids(path, body)
    is_chat = path.endswith("chat/completions")
    wants_ids = body.get("return_token_ids")
    kind = "chat.completion.chunk" if is_chat else "text_completion"
    common = {"id": stream_id, "object": kind, "created": int(stream_id[-3:]), "model": MODEL}
    events: list[dict[str, Any]] = []
    if is_chat:
        role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        events.append({**common, "choices": [role], "prompt_token_ids": prompt if wants_ids else None})
    offset = num_tokens = 0
    for step in steps(prompt, body):
        logprobs = logprobs_of(step.token, body, is_chat, offset)
        offset, num_tokens = offset + len(decode([step.token])), num_tokens + 1
        text = {"delta": {"content": step.text}} if is_chat else {"text": step.text}
        choice: dict[str, Any] = {"index": 0, **text, "logprobs": logprobs, "finish_reason": step.finish_reason}
        if not is_chat or step.finish_reason:
            choice["stop_reason"] = step.stop_reason
        if not is_chat:
            choice["prompt_token_ids"] = prompt if wants_ids and num_tokens == 1 else None
        choice["token_ids"] = [step.token] if wants_ids else None
        events.append({**common, "choices": [choice]})
    if (body.get("stream_options") or {}).get("include_usage"):
        usage: dict[str, Any] = {"prompt_tokens": len(prompt), "completion_tokens": num_tokens}
        usage["total_tokens"] = len(prompt) + num_tokens
        cached = (body.get("kv_transfer_params") or {}).get("remote_prefill_cached_tokens")
        if cached is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": cached}
        events.append({**common, "choices": [], "usage": usage})
    return [b"data: " + orjson.dumps(event) + b"\n\n" for event in events] + [b"data: [DONE]\n\n"]


def generate(stream_id: str, die_after: int | None = None, pause: float = 0.0) -> Behaviour:
    """Streams; breaks the connection after `die_after` events."""

    async def answer(engine: ScriptedEngine, request: web.Request, seen: Seen) -> web.StreamResponse:
        if seen.path == Task.DETOKENIZE:
            return web.json_response({"prompt": decode(seen.body["tokens"])})
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
