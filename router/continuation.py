"""A stream that outlives its engine: what the client has of it, and the request for the rest.

While a stream runs, the engine is asked for the ids of its tokens; they are kept, a few bytes each, and taken out of
what the client gets. When the engine dies, another one gets a completion of prompt + tokens so far, in ids, so that the
rest is what the first one would have generated. Its chunks are then dressed as the stream that they continue
(router/continued.py).
"""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from typing import TYPE_CHECKING

import orjson

from router.continued import Before, Continued, StopText
from router.recent import Recent, text_of
from router.stream_fields import CantContinue, check_fields, for_the_rest, stop_strings
from router.types import Api, GenerationRequest, JsonObject, NoContinuation

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

_COMPLETION_TOKENS = 16  # what vLLM's completions API generates at most when nobody says

_IDS = b'"token_ids":['
_PROMPT_IDS = b'"prompt_token_ids":['
_SPECIAL = b'"reasoning'  # a reasoning parser's field, or such a word in quotes
_CHOICE, _ROLE, _CHOICES = b'"choices":[{', b'"role":', b',"choices":'
_REASONING = (b'"reasoning":', b'"reasoning_content":')
_DONE = b"data: [DONE]\n\n"

_WINDOW = 16  # tokens whose text is looked at: a character has at most four (byte-level BPE)
_MAX_DROPPED = 8  # tokens of a character that is not whole; a character of UTF-8 lacks three at most


class AnswerEnded(Exception):
    """The client has all of its answer, and the engine goes on: a stop string began on an engine before it."""


class Transcript:
    """The tokens of one answer that the client has been sent."""

    def __init__(self, request: GenerationRequest) -> None:
        """Raises CantContinue if another engine could not go on with the answer as if it had begun it."""
        check_fields(request)
        self._request = request
        self._is_chat = request.api is Api.CHAT
        self._text_mark = b'"content":"' if self._is_chat else b'"text":"'
        self._wants_ids = bool(request.body.get("return_token_ids"))
        self._shows_tokens = self._wants_ids or request.body.get("logprobs") not in (None, False)
        self._ids = bytearray()
        self._last = b""  # what the client was sent last
        # With stop strings, whose text is held back: the last events, as they came and as they were sent.
        self._recent = Recent() if max(map(len, stop_strings(request.body)[0]), default=0) > 1 else None
        self._head = b""  # of all events: their id, their time
        self._prompt = 0, 0  # its number of tokens, and the hash of their ids
        self._has_ids = True
        self._has_begun = False  # the client was sent text, and what comes now is no parser's
        self._is_under_way = False  # it has, and this is no continuation
        self._continued: Continued | None = None
        self.num_cached: int | None = None  # tokens of the prompt that the first prefill engine had, if it said so

    def take(self, events: bytes) -> bytes:
        """Notes the tokens in an engine's events, which are whole; returns what the client gets for them.

        Raises AnswerEnded if that is nothing any more.
        """
        begin = events.find(_IDS) + len(_IDS)
        is_plain = begin > len(_IDS) and events.find(b"\n\n") == len(events) - 2 and _SPECIAL not in events
        if is_plain and self._is_under_way and (end := events.find(b"]", begin)) > begin:
            self._ids += events[begin:end] + b","  # one event, as nearly all: the same as below, in fewer steps
            self._last = b"%bnull%b" % (events[: begin - 1], events[end + 1 :])
        elif self._continued is None:
            self._last = self._take_any(events)
            self._is_under_way = self._has_begun and not self._wants_ids
        else:
            if self._continued.is_over:
                raise AnswerEnded
            dressed, ids = self._continued.dress(events)
            self._ids += b"".join(b"%d," % token for token in ids)
            self._last = dressed + self._end_of(orjson.loads(self._head)) if self._continued.is_over else dressed
        if self._recent is not None:
            self._recent.append(events, self._last)
        return self._last

    def _take_any(self, events: bytes) -> bytes:
        if not self._head:
            head, choices, _ = events.partition(_CHOICES)
            self._head = head.removeprefix(b"data: ") + b"}" if choices else b"{}"
        # A reasoning parser's state can't be handed over; once the answer itself has begun it has none.
        if self._is_chat and (_REASONING[0] in events or _REASONING[1] in events):
            self._has_begun = False
        elif events.count(self._text_mark) > events.count(self._text_mark + b'"'):
            self._has_begun = True
        # Chat's first chunk, with the role, has no token. An engine that does not tell ids can't be continued.
        if events.count(_CHOICE) - events.count(_ROLE) > events.count(_IDS):
            self._has_ids = False
        events = self._cut(events, _IDS, self._ids)
        if _PROMPT_IDS in events:
            prompt = bytearray()
            events = self._cut(events, _PROMPT_IDS, prompt)
            self._prompt = prompt.count(b","), hash(bytes(prompt))
        return events

    def _cut(self, events: bytes, mark: bytes, into: bytearray) -> bytes:
        # JSON escapes the quotes in a text, so no text can hold a mark.
        parts: list[bytes] = []
        start = 0
        at = events.find(mark)
        while at >= 0:
            begin = at + len(mark)
            end = events.find(b"]", begin)
            if end < 0:  # only the end of an event that is too long to be kept whole
                self._has_ids = False
                break
            if end > begin:
                into += events[begin:end] + b","
            if not self._wants_ids:
                parts += (events[start : begin - 1], b"null")
                start = end + 1
            at = events.find(mark, end)
        return b"".join((*parts, events[start:])) if parts else events

    def ending(self) -> bytes | None:
        """What the client lacks if it has the last token already; None if it lacks tokens."""
        if self._last.endswith(_DONE):
            return b""
        event = _last_event(self._last)
        choices = event.get("choices")
        if choices and choices[0].get("finish_reason") is not None and self._prompt[0]:
            return self._end_of(event)
        return _DONE if choices == [] else None  # after the usage

    def _end_of(self, event: JsonObject) -> bytes:
        options = self._request.body.get("stream_options") or {}
        if not options.get("include_usage"):
            return _DONE
        num_prompt, num_tokens = self._prompt[0], self._ids.count(b",")
        usage: JsonObject = {"prompt_tokens": num_prompt, "completion_tokens": num_tokens}
        usage["total_tokens"] = num_prompt + num_tokens
        if self.num_cached is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": self.num_cached}
        common = {name: event[name] for name in ("id", "object", "created", "model") if name in event}
        return b"data: " + orjson.dumps({**common, "choices": [], "usage": usage}) + b"\n\n" + _DONE

    async def remaining(
        self, prompt_ids: Sequence[int], context: int, decode: Callable[[list[int]], Awaitable[str]]
    ) -> GenerationRequest:
        """A completion of what is missing. From now on what is taken is its answer.

        Args:
            prompt_ids: the client's prompt, in tokens.
            context: tokens that the model's context holds.
            decode: gives the text of some tokens.

        Raises CantContinue.
        """
        if not self._has_ids:
            raise CantContinue(NoContinuation.NO_IDS)
        if self._is_chat and not self._has_begun:
            raise CantContinue(NoContinuation.REASONING)
        if self._prompt != (len(prompt_ids), hash(orjson.dumps(prompt_ids)[1:-1] + b",")):
            raise CantContinue(NoContinuation.PROMPT)
        ids: list[int] = orjson.loads(b"[" + bytes(self._ids[:-1]) + b"]")
        body = self._request.body
        shown = ids
        ids, stop_text = await self._whole_characters(prompt_ids, ids, decode)
        again = shown[len(ids) :] if self._shows_tokens else []
        given = body.get("max_completion_tokens") or body.get("max_tokens")
        num_left = (given or (context - len(prompt_ids) if self._is_chat else _COMPLETION_TOKENS)) - len(ids)
        if num_left < 1:
            raise CantContinue(NoContinuation.LENGTH)
        rest: JsonObject = {**for_the_rest(self._request), "prompt": [*prompt_ids, *ids], "max_tokens": num_left}
        if body.get("min_tokens"):
            rest["min_tokens"] = max(0, body["min_tokens"] - len(ids))
        if stop_text is not None:  # the engine must not hold back what only this router can tell to be no stop string
            rest["include_stop_str_in_output"] = True
        self._ids = bytearray(b"".join(b"%d," % token for token in ids))
        before = Before(orjson.loads(self._head), len(ids), again, self._text_offset(), self.num_cached)
        self._continued = Continued(self._request, before, stop_text)
        self._is_under_way = False
        return dataclasses.replace(self._request, api=Api.COMPLETIONS, body=rest)

    async def _whole_characters(
        self, prompt_ids: Sequence[int], ids: list[int], decode: Callable[[list[int]], Awaitable[str]]
    ) -> tuple[list[int], StopText | None]:
        """The tokens without those of a character that is not whole, which must be generated again; and the text of the
        last ones, if a stop string may begin in it.

        A detokenizer that begins within a character loses it, or gives all of the prompt's text.
        """
        if self._recent is None and text_of(_last_event(self._last)):
            return ids, None
        # What the client has seen of tokens can be generated again only where no chance is in it.
        can_drop = not self._shows_tokens or self._request.body.get("temperature") == 0
        for num_dropped in range(min(_MAX_DROPPED, len(ids)) + 1 if can_drop else 1):
            kept = ids[: len(ids) - num_dropped]
            text = await decode([*prompt_ids[-_WINDOW:], *kept[-_WINDOW:]][-_WINDOW:])
            if not text.endswith("\ufffd"):
                break
        else:
            raise CantContinue(NoContinuation.TEXT)
        if self._recent is None:
            return kept, None
        if not self._has_begun:
            raise CantContinue(NoContinuation.TEXT)
        stops, is_included = stop_strings(self._request.body)
        num_held = max(map(len, stops)) - 1
        # vLLM holds back as much as it may once something was sent.
        text = await self._recent.text(prompt_ids, kept, decode, 0 if is_included else num_held)
        min_tokens = max(0, (self._request.body.get("min_tokens") or 0) - len(kept))
        return kept, StopText(stops, is_included, min_tokens, text[-num_held:])

    def _text_offset(self) -> int:
        """In the answer's text, of the next token: the completions API tells it beside a token's probability."""
        if self._is_chat or self._request.body.get("logprobs") is None:
            return 0
        told = _last_event(self._last)["choices"][0].get("logprobs")
        if not told or not told["tokens"]:
            raise CantContinue(NoContinuation.TEXT)
        return int(told["text_offset"][-1]) + len(told["tokens"][-1])


def _last_event(events: bytes) -> JsonObject:
    """Empty if there is none, or only a part of it: those are too long to be kept whole."""
    lines = [line for line in events.splitlines() if line.startswith(b"data: {")]
    with suppress(orjson.JSONDecodeError):
        event: JsonObject = orjson.loads(lines[-1].removeprefix(b"data: ")) if lines else {}
        return event
    return {}
