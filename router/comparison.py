"""Two answers to one greedy request, compared: what the client got, and what one engine alone wrote later.

Texts are compared, because the client's answer went through byte for byte and need not hold token ids. Where they
part, the second answer's log probabilities tell a tie, which rounding may decide either way, from a wrong token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import orjson

from router.types import Api, JsonObject, Task

NUM_ALTERNATIVES = 5  # log probabilities asked for at each token; the client's token is among them, or it is wrong


class GuardResult(StrEnum):
    """The values are labels of a metric."""

    EQUAL = "equal"
    TIE = "tie"  # they part where the likeliest tokens are as good as equally likely
    DIFFERENT = "different"
    UNCLEAR = "unclear"  # they part among tokens that are no text by themselves, and a tie somewhere may be why
    FAILED = "failed"  # the engine gave no second answer
    SKIPPED = "skipped"  # no time or place for a second answer


@dataclass(frozen=True, slots=True)
class Token:
    """One token of the second answer: its text, and others' text with how much less likely they were, in nats."""

    text: str
    alternatives: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """`position` is the first character that differs, `token` the number of the token that holds it, `gap` in nats."""

    result: GuardResult
    position: int | None = None
    token: int | None = None
    gap: float | None = None


def compare(got: str, again: Answer, tolerance: float) -> Verdict:
    """`tolerance` in nats: a token that is less likely than the best by no more than that ties with it."""
    if got == again.text:
        return Verdict(GuardResult.EQUAL)
    position = _common_length(got, again.text)
    if not again.text.startswith("".join(token.text for token in again.tokens)[:position]):
        # Tokens that are no text by themselves, such as parts of a character: no place to look at. But without a tie
        # anywhere none can have been the reason.
        smallest = min((gap for token in again.tokens for _, gap in token.alternatives), default=math.inf)
        return Verdict(GuardResult.UNCLEAR if smallest <= tolerance else GuardResult.DIFFERENT, position)
    index = _token_at(again.tokens, position)
    if index is None:
        return Verdict(GuardResult.DIFFERENT, position)
    nearest = min((gap for _, gap in again.tokens[index].alternatives), default=None)
    if nearest is not None and nearest <= tolerance:
        return Verdict(GuardResult.TIE, position, index, nearest)
    return _earlier_tie(got, again.tokens[:index], position, tolerance) or Verdict(
        GuardResult.DIFFERENT, position, index, nearest
    )


def _earlier_tie(got: str, tokens: Sequence[Token], position: int, tolerance: float) -> Verdict | None:
    """A longer token of the client's that begins like ours: "ab" + "c" against "abd" part at the first, not at "c"."""
    start = 0
    for index, token in enumerate(tokens):
        for text, gap in token.alternatives:
            if gap <= tolerance and start + len(text) > position and got.startswith(text, start):
                return Verdict(GuardResult.TIE, position, index, gap)
        start += len(token.text)
    return None


def _common_length(one: str, other: str) -> int:
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)


def _token_at(tokens: Sequence[Token], position: int) -> int | None:
    """The token that holds the character; after the last character that is the one that ended the text."""
    end = 0
    for index, token in enumerate(tokens):
        end += len(token.text)
        if end > position:
            return index
    return len(tokens) - 1 if tokens else None


def streamed_text(api: Api | Task, raw: bytes) -> str:
    """The text of a stream of server-sent events. Raises ValueError, KeyError or TypeError if it is none."""
    return "".join(_piece(choice, api, "delta") for choice in _streamed_choices(raw))


def whole_text(api: Api | Task, raw: bytes) -> str:
    """The text of an answer in one piece. Raises as `streamed_text` does, and IndexError."""
    return _piece(orjson.loads(raw)["choices"][0], api, "message")


def whole_answer(api: Api | Task, raw: bytes) -> Answer:
    """An answer in one piece that was asked for with NUM_ALTERNATIVES log probabilities. Raises as `whole_text`."""
    choice = orjson.loads(raw)["choices"][0]
    told = choice["logprobs"]
    tokens = _chat_tokens(told["content"]) if api is Api.CHAT else _completion_tokens(told)
    return Answer(_piece(choice, api, "message"), tuple(tokens))


def _streamed_choices(raw: bytes) -> Iterator[JsonObject]:
    for line in raw.splitlines():
        if line.startswith(b"data:") and not line.endswith(b"[DONE]"):
            yield from orjson.loads(line.removeprefix(b"data:"))["choices"]


def _piece(choice: JsonObject, api: Api | Task, part: str) -> str:
    if api is Api.COMPLETIONS:
        return choice["text"] or ""
    said: JsonObject = choice[part]
    return (said.get("reasoning") or said.get("reasoning_content") or "") + (said.get("content") or "")


def _chat_tokens(content: list[Any]) -> Iterator[Token]:
    for token in content:
        others = [(other["token"], token["logprob"] - other["logprob"]) for other in token["top_logprobs"]]
        yield Token(token["token"], _others(token["token"], others))


def _completion_tokens(told: JsonObject) -> Iterator[Token]:
    for text, logprob, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        yield Token(text, _others(text, [(other, logprob - value) for other, value in (top or {}).items()]))


def _others(text: str, alternatives: list[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    """Without the token itself. A gap below 0 is a likelier token, which greedy sampling took in vain: no gap."""
    return tuple((other, max(0.0, gap)) for other, gap in alternatives if other != text)
