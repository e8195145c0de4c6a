"""The rest of a stream, from another engine, in the shape of the stream that it continues."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from router.errors import StreamBroken
from router.types import Api, JsonObject

if TYPE_CHECKING:
    from collections.abc import Sequence

    from router.types import GenerationRequest


class StopText:
    """Stop strings in a text that began on another engine.

    By vLLM's rules (IncrementalDetokenizer and check_stop_strings in vllm/v1/engine/detokenizer.py): the string that is
    complete first ends the answer; unless it is to be shown, as many characters are held back as may belong to one.
    """

    def __init__(self, stops: Sequence[str], is_included: bool, min_tokens: int, text: str) -> None:
        """`text` is the end of what there was before: what was held back, or with `is_included` sent already."""
        self._stops = stops
        self._is_included = is_included
        self._num_held = max(map(len, stops)) - 1
        self._num_unchecked = min_tokens
        self._text = text
        self._num_sent = len(text) if is_included else 0

    def take(self, choice: JsonObject, text: str) -> str:
        """What the client gets of a chunk's text. Says so in the chunk if the answer ends here."""
        num_tokens = len(choice.get("token_ids") or ())
        if choice.get("finish_reason") == "stop" and not isinstance(choice.get("stop_reason"), str):
            # By a stop token, whose text this engine was asked to show with that of stop strings. (Several tokens a
            # chunk can't be told apart; the text of most stop tokens is not shown anyway, because they are special.)
            text = "" if num_tokens == 1 and not self._is_included else text
        begin = len(self._text)
        self._text += text
        self._num_unchecked -= num_tokens
        found = self._find(begin) if self._num_unchecked < 0 else None
        if found is not None:
            at, stop = found
            choice |= {"finish_reason": "stop", "stop_reason": stop}
            return self._text[self._num_sent : at + len(stop) if self._is_included else at]
        num_shown = len(self._text)
        if choice.get("finish_reason") is None and not self._is_included:
            num_shown -= self._num_held
        shown = self._text[self._num_sent : num_shown]
        self._num_sent = max(self._num_sent, num_shown)
        num_done = max(0, min(self._num_sent, len(self._text) - self._num_held))
        self._text, self._num_sent = self._text[num_done:], self._num_sent - num_done
        return shown

    def _find(self, begin: int) -> tuple[int, str] | None:
        """Where the stop string begins that is complete first after `begin`, and which it is."""
        places = ((self._text.find(stop, max(0, begin + 1 - len(stop))), stop) for stop in self._stops)
        return min((p for p in places if p[0] >= 0), key=lambda p: p[0] + len(p[1]), default=None)


@dataclass(frozen=True, slots=True)
class Before:
    """What the engines before have sent."""

    first: JsonObject  # the fields that all of its events share
    num_tokens: int
    again: list[int]  # tokens that come again, and that the client has seen
    text_offset: int  # of the token after these, in the answer's text
    num_cached: int | None  # tokens of the prompt that the first engine had cached, if that is known


class Continued:
    """Dresses the events of a completion of prompt + tokens so far."""

    def __init__(self, request: GenerationRequest, before: Before, stop_text: StopText | None) -> None:
        """`request` is the client's, `stop_text` there if a stop string may begin in what was there before."""
        self._is_chat = request.api is Api.CHAT
        self._wants_ids = bool(request.body.get("return_token_ids"))
        self._num_top = request.body.get("top_logprobs") or 0
        self._common: JsonObject = {n: before.first[n] for n in ("id", "object", "created") if n in before.first}
        self._before = before
        self._again = list(before.again)
        self._text_offset = before.text_offset
        self._stop_text = stop_text
        self.is_over = False  # by a stop string of which the engine has seen the end alone: it goes on

    def dress(self, events: bytes) -> tuple[bytes, list[int]]:
        """Whole events, and the tokens in them. Raises StreamBroken."""
        dressed: list[bytes] = []
        ids: list[int] = []
        for line in events.splitlines(keepends=True):
            if not line.startswith(b"data: {"):
                dressed.append(line)
                continue
            chunk: JsonObject = {**orjson.loads(line.removeprefix(b"data: ")), **self._common}
            for choice in chunk.get("choices", ()):
                ids += choice.get("token_ids") or ()
                self._dress_choice(choice)
            if usage := chunk.get("usage"):
                self._dress_usage(usage)
            dressed.append(b"data: " + orjson.dumps(chunk) + b"\n")
            if self.is_over:
                dressed.append(b"\n")
                break
        return b"".join(dressed), ids

    def _dress_choice(self, choice: JsonObject) -> None:
        choice.pop("prompt_token_ids", None)
        text = choice.pop("text", "")
        if self._stop_text is not None:
            was_going_on = choice.get("finish_reason") is None
            text = self._stop_text.take(choice, text)
            self.is_over = was_going_on and choice.get("finish_reason") is not None
        if self._again:
            self._take_away(choice)
        logprobs = choice.get("logprobs")
        if self._is_chat:
            choice["delta"] = {"content": text}
            choice["logprobs"] = logprobs and {"content": self._of_chat(logprobs)}
            if choice.get("finish_reason") is None:
                choice.pop("stop_reason", None)
        else:
            choice["text"] = text
            if logprobs:
                logprobs["text_offset"] = [self._text_offset + at for at in logprobs["text_offset"]]
        if not self._wants_ids:
            choice["token_ids"] = None

    def _take_away(self, choice: JsonObject) -> None:
        """The tokens that the client has seen already."""
        ids = choice.get("token_ids") or []
        count = min(len(ids), len(self._again))
        if ids[:count] != self._again[:count]:
            raise StreamBroken(
                "The engine of this stream failed, and the one that went on with it generated other tokens than the "
                "client has. Please retry the request."
            )
        del self._again[:count]
        choice["token_ids"] = ids[count:]
        if logprobs := choice.get("logprobs"):
            self._text_offset -= sum(map(len, logprobs["tokens"][:count]))
            choice["logprobs"] = {name: told[count:] for name, told in logprobs.items()} if ids[count:] else None

    def _of_chat(self, logprobs: JsonObject) -> list[JsonObject]:
        """Log-probabilities in chat's form. Of alternatives with one text the completions API tells one."""
        told = zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
        return [
            {
                **_logprob(token, logprob),
                "top_logprobs": [_logprob(*alternative) for alternative in _first(top, self._num_top)],
            }
            for token, logprob, top in told
        ]

    def _dress_usage(self, usage: dict[str, Any]) -> None:
        usage["prompt_tokens"] -= self._before.num_tokens
        usage["completion_tokens"] = usage.get("completion_tokens", 0) + self._before.num_tokens
        if (details := usage.get("prompt_tokens_details")) and details.get("cached_tokens") is not None:
            known = self._before.num_cached
            details["cached_tokens"] = min(details["cached_tokens"], usage["prompt_tokens"]) if known is None else known


def _first(top: dict[str, float] | None, count: int) -> list[tuple[str, float]]:
    alternatives = list((top or {}).items())
    return alternatives if count < 0 else alternatives[:count]


def _logprob(token: str, logprob: float | None) -> JsonObject:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode(errors="replace"))}
