"""A stream that outlives its engine: what the client has of it, and the request for the rest.

While a stream runs, the engine is asked for the ids of its tokens; they are kept, a few bytes each, and taken out of
what the client gets. When the engine dies, another one gets a completion of prompt + tokens so far, in ids, so that the
rest is what the first one would have generated. Its chunks are then dressed as the stream that they continue.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import orjson

from router.types import Api, GenerationRequest, JsonObject

if TYPE_CHECKING:
    from collections.abc import Sequence

# What the prompt's ids depend on, and what only the chat API knows.
_TEMPLATE = ("messages", "add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs")
_PROMPT = ("prompt", "add_special_tokens")
_CHAT_ONLY = ("max_completion_tokens", "metadata", "store", "service_tier")

# Fields that mean the same for prompt + tokens so far as for the prompt. Any other, known or not, rules a continuation
# out: `stop`, because the engine holds text back that may be the beginning of one; penalties, because they tell the
# answer's tokens from the prompt's; logprobs, `echo`, tools and structured output, because they depend on where the
# answer began.
_NEUTRAL = frozenset(
    (
        *(*_TEMPLATE, *_PROMPT, *_CHAT_ONLY, "model", "stream", "stream_options", "user", "max_tokens", "min_tokens"),
        *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "logit_bias", "allowed_token_ids"),
        *("ignore_eos", "stop_token_ids", "skip_special_tokens", "spaces_between_special_tokens"),
        *("return_token_ids", "priority"),
    )
)
_COMPLETION_TOKENS = 16  # what vLLM's completions API generates at most when nobody says

_IDS = b'"token_ids":['
_PROMPT_IDS = b'"prompt_token_ids":['
_SPECIAL = b'"reasoning'  # a reasoning parser's field, or such a word in quotes
_CHOICE, _ROLE = b'"choices":[{', b'"role":'
_REASONING = (b'"reasoning":', b'"reasoning_content":')


def can_continue(request: GenerationRequest) -> bool:
    """Whether another engine could go on with the answer as if it had begun it."""
    if not request.stream or request.api not in (Api.COMPLETIONS, Api.CHAT):
        return False
    body = request.body
    prompt = body.get("prompt")
    is_one = request.api is Api.CHAT or isinstance(prompt, str) or (isinstance(prompt, list) and type(prompt[0]) is int)
    # A generator's state dies with the engine; without randomness there is none.
    is_reproducible = body.get("seed") is None or body.get("temperature") == 0
    has_logprobs = body.get("logprobs") is not None and body["logprobs"] is not False  # 0 asks for the sampled token's
    ruled_out = {name for name, value in body.items() if value and name not in _NEUTRAL}
    ruled_out -= {"seed"}
    if request.num_choices == 1:
        ruled_out.discard("n")
    return is_one and is_reproducible and not has_logprobs and not ruled_out


class Transcript:
    """The tokens of one answer that the client has been sent."""

    def __init__(self, request: GenerationRequest) -> None:
        self._request = request
        self._wants_ids = bool(request.body.get("return_token_ids"))
        self._ids = bytearray()
        self._is_under_way = False  # its first events are noted, and it is no continuation
        self._first = b""  # event; all of a stream have its id and its time
        self._is_text = True  # and its tokens are known; a reasoning parser's state can't be handed over
        self._common: JsonObject | None = None  # set once this stream is a continuation
        self._num_before = 0  # tokens that engines before the present one generated

    def take(self, events: bytes) -> bytes:
        """Notes the tokens in an engine's events, which are whole; returns what the client gets for them."""
        begin = events.find(_IDS) + len(_IDS)
        is_plain = begin > len(_IDS) and events.find(b"\n\n") == len(events) - 2 and _SPECIAL not in events
        if is_plain and self._is_under_way and (end := events.find(b"]", begin)) > begin:
            self._ids += events[begin:end] + b","  # one event, as nearly all: the same as below, in fewer steps
            return b"%bnull%b" % (events[: begin - 1], events[end + 1 :])
        events = self._take_any(events)
        self._is_under_way = self._common is None and not self._wants_ids
        return events

    def _take_any(self, events: bytes) -> bytes:
        if not self._first:
            self._first = events.split(b"\n", 1)[0]
        if self._is_text and (_REASONING[0] in events or _REASONING[1] in events):
            self._is_text = False
        # Chat's first chunk, with the role, has no token. An engine that does not tell ids can't be continued.
        if events.count(_CHOICE) - events.count(_ROLE) > events.count(_IDS):
            self._is_text = False
        events = self._cut(events, _IDS, self._ids)
        if _PROMPT_IDS in events:
            events = self._cut(events, _PROMPT_IDS, None)
        return events if self._common is None else b"".join(map(self._dress, events.splitlines(keepends=True)))

    def remaining(self, prompt_ids: Sequence[int], context: int) -> GenerationRequest | None:
        """A completion of what is missing; None if nothing is, or if it can't be told.

        Args:
            prompt_ids: the client's prompt, in tokens.
            context: tokens that the model's context holds.
        """
        if not self._is_text:
            return None
        ids: list[int] = orjson.loads(b"[" + bytes(self._ids[:-1]) + b"]")
        body = self._request.body
        given = body.get("max_completion_tokens") or body.get("max_tokens")
        default = context - len(prompt_ids) if self._request.api is Api.CHAT else _COMPLETION_TOKENS
        num_left = (given or default) - len(ids)
        if num_left < 1:
            return None
        dropped = (*_TEMPLATE, *_PROMPT, *_CHAT_ONLY)
        rest: JsonObject = {name: value for name, value in body.items() if name not in dropped}
        rest |= {"prompt": [*prompt_ids, *ids], "max_tokens": num_left}
        if body.get("min_tokens"):
            rest["min_tokens"] = max(0, body["min_tokens"] - len(ids))
        self._num_before = len(ids)
        self._is_under_way = False
        if self._first and self._common is None:
            first: JsonObject = orjson.loads(self._first.removeprefix(b"data: "))
            self._common = {name: first[name] for name in ("id", "object", "created") if name in first}
        return dataclasses.replace(self._request, api=Api.COMPLETIONS, body=rest)

    def _cut(self, events: bytes, mark: bytes, into: bytearray | None) -> bytes:
        # JSON escapes the quotes in a text, so no text can hold a mark.
        parts: list[bytes] = []
        start = 0
        at = events.find(mark)
        while at >= 0:
            begin = at + len(mark)
            end = events.find(b"]", begin)
            if end < 0:  # only the end of an event that is too long to be kept whole
                self._is_text = False
                break
            if into is not None and end > begin:
                into += events[begin:end] + b","
            if not self._wants_ids:
                parts += (events[start : begin - 1], b"null")
                start = end + 1
            at = events.find(mark, end)
        return b"".join((*parts, events[start:])) if parts else events

    def _dress(self, line: bytes) -> bytes:
        """One line of a continuation's events, as the client's own API would have it."""
        if not line.startswith(b"data: {") or self._common is None:
            return line
        chunk: JsonObject = orjson.loads(line.removeprefix(b"data: "))
        chunk |= self._common
        for choice in chunk.get("choices", ()):
            choice.pop("prompt_token_ids", None)
            if self._request.api is Api.CHAT:
                choice["delta"] = {"content": choice.pop("text", "")}
        usage: dict[str, Any] | None = chunk.get("usage")
        if usage:
            usage["prompt_tokens"] -= self._num_before
            usage["completion_tokens"] = usage.get("completion_tokens", 0) + self._num_before
        return b"data: " + orjson.dumps(chunk) + b"\n"
