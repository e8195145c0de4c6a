from __future__ import annotations

from typing import Any

import orjson
import pytest

from router.comparison import Answer, GuardResult, Token, Verdict, compare, streamed_text, whole_answer, whole_text
from router.types import Api

TOLERANCE = 0.125


def answer(*tokens: tuple[str, dict[str, float]]) -> Answer:
    """Tokens with their alternatives' gaps."""
    made = tuple(Token(text, tuple(gaps.items())) for text, gaps in tokens)
    return Answer("".join(token.text for token in made), made)


AGAIN = answer((" a", {" b": 3.0}), (" cat", {" dog": 0.05, " cow": 2.0}), (" sat", {" lay": 0.5}), ("", {" on": 4.0}))


@pytest.mark.parametrize(
    ("got", "result", "position", "token"),
    [
        (" a cat sat", GuardResult.EQUAL, None, None),
        (" a dog ran", GuardResult.TIE, 3, 1),
        (" a cow sat", GuardResult.TIE, 4, 1),  # the two likeliest are tied there, whichever the client's is
        (" a cat lay", GuardResult.DIFFERENT, 7, 2),
        (" a cat sat down", GuardResult.DIFFERENT, 10, 3),  # the token that ended the text
        (" a cat", GuardResult.DIFFERENT, 6, 2),
        ("", GuardResult.DIFFERENT, 0, 0),
    ],
)
def test_where_two_answers_part(got: str, result: GuardResult, position: int | None, token: int | None) -> None:
    verdict = compare(got, AGAIN, TOLERANCE)
    assert (verdict.result, verdict.position, verdict.token) == (result, position, token)


def test_the_tolerance_decides() -> None:
    assert compare(" a cat lay", AGAIN, 0.5).result is GuardResult.TIE
    assert compare(" a dog sat", AGAIN, 0.04).result is GuardResult.DIFFERENT


def test_a_longer_token_that_begins_like_ours_ties_where_it_begins() -> None:
    again = answer(("ab", {"abd": 0.01}), ("c", {"x": 9.0}))
    assert compare("abd", again, TOLERANCE) == compare("abdx", again, TOLERANCE)
    verdict = compare("abd", again, TOLERANCE)
    assert (verdict.result, verdict.position, verdict.token, verdict.gap) == (GuardResult.TIE, 2, 0, 0.01)


def test_among_tokens_that_are_no_text_only_answers_without_any_tie_are_different() -> None:
    again = Answer("éa", (Token("\ufffd", ()), Token("\ufffd", ()), Token("a", (("b", 0.0),))))
    assert compare("éb", again, TOLERANCE) == Verdict(GuardResult.UNCLEAR, 1)
    sure = Answer("éa", (Token("\ufffd", ()), Token("\ufffd", (("x", 2.0),)), Token("a", (("b", 1.0),))))
    assert compare("éb", sure, TOLERANCE) == Verdict(GuardResult.DIFFERENT, 1)
    assert compare("x", Answer("y"), TOLERANCE) == Verdict(GuardResult.DIFFERENT, 0)


def events(*choices: Any) -> bytes:
    lines = [b"data: " + orjson.dumps({"choices": [choice]}) for choice in choices]
    return b"\r\n\r\n".join([b": ping", *lines, b'data: {"choices":[],"usage":{}}', b"data: [DONE]", b""])


def test_texts_of_both_apis_streamed_and_whole() -> None:
    assert streamed_text(Api.COMPLETIONS, events({"text": "a"}, {"text": " b"})) == "a b"
    pieces = [
        {"role": "assistant", "content": ""},
        {"reasoning": "hm"},
        {"content": "yes"},
        {},
    ]
    assert streamed_text(Api.CHAT, events(*({"delta": piece} for piece in pieces))) == "hmyes"
    assert whole_text(Api.COMPLETIONS, orjson.dumps({"choices": [{"text": "a b"}]})) == "a b"
    message = {"reasoning_content": "hm", "content": "yes", "tool_calls": []}
    assert whole_text(Api.CHAT, orjson.dumps({"choices": [{"message": message}]})) == "hmyes"


def test_log_probabilities_of_both_apis() -> None:
    told = {"tokens": ["a", "b"], "token_logprobs": [-0.5, -1.0], "top_logprobs": [{"a": -0.5, "c": -0.75}, None]}
    again = whole_answer(Api.COMPLETIONS, orjson.dumps({"choices": [{"text": "ab", "logprobs": told}]}))
    assert again == Answer("ab", (Token("a", (("c", 0.25),)), Token("b", ())))
    top = [{"token": "a", "logprob": -0.5}, {"token": "c", "logprob": -0.25}]
    content = [{"token": "a", "logprob": -0.5, "top_logprobs": top}]
    choice = {"message": {"content": "a"}, "logprobs": {"content": content}}
    assert whole_answer(Api.CHAT, orjson.dumps({"choices": [choice]})) == Answer("a", (Token("a", (("c", 0.0),)),))
