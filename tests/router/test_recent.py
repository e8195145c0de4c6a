"""The text of tokens, told by what was sent of it; streams that break everywhere are in test_continuation.py."""

from __future__ import annotations

import asyncio

import orjson
import pytest

from router.recent import Recent
from router.stream_fields import CantContinue
from tests.router.generating_engine import SPECIAL, decode

NUM_HELD = 4


def sent(*texts: str, ids: int | None = None) -> Recent:
    """One event a text, of a token of its own or of `ids`."""
    recent = Recent()
    for text in texts:
        event = {"choices": [{"text": text, "token_ids": [ord(text or "x") if ids is None or text else ids]}]}
        data = b"data: " + orjson.dumps(event) + b"\n\n"
        recent.append(data, data)
    return recent


def text(recent: Recent, ids: list[int], num_held: int = NUM_HELD) -> str:
    async def decoded(tokens: list[int]) -> str:
        return decode(tokens)

    return asyncio.run(recent.text([ord("?")], ids, decoded, num_held))


def ids_of(answer: str) -> list[int]:
    return [SPECIAL if char == "#" else ord(char) for char in answer]


def test_what_is_held_back_is_the_end_of_the_tokens_text() -> None:
    assert text(sent(*"abcdefghij"), ids_of("abcdefghijklmn")).endswith("klmn")
    assert text(sent(*"abc"), ids_of("abcdefg")) == "abcdefg", "short, and all of it is known"


@pytest.mark.parametrize("answer", ["abcdefghij#klmn", "abcdefghijkl#mn#", "#abcdefghijklmn"])
def test_special_tokens_have_no_text(answer: str) -> None:
    assert text(sent(*"abcdefghi", "", "j", ids=SPECIAL), ids_of(answer)).endswith("hijklmn")


def test_one_that_came_before_any_text_is_found_too() -> None:
    assert text(sent("", *"abc", ids=SPECIAL), ids_of("#abcdefg")) == "abcdefg"


@pytest.mark.parametrize("answer", ["abcdefghijkl#mn", "abcdefghij", "XXXXXXXXXXXXXX", ""])
def test_a_text_that_does_not_fit_to_what_was_sent_is_refused(answer: str) -> None:
    with pytest.raises(CantContinue) as found:
        text(sent(*"abcdefghij"), ids_of(answer))
    assert found.value.reason == "text"


def test_little_text_among_many_tokens_proves_nothing() -> None:
    with pytest.raises(CantContinue):
        text(sent(*[""] * 60, *"abc"), ids_of("abcdefg"))
