"""A stream whose engine dies goes on with another one, and the client sees no break."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from router.continuation import Transcript, can_continue
from router.types import Api
from router.validation import parse_request
from tests.router.conftest import Stack, StartStack
from tests.router.generating_engine import events_of, generate
from tests.router.running import wait_for
from tests.router.scripted_engine import raw_stream

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hello"}]
USAGE = {"include_usage": True}


def body(path: str, **fields: Any) -> dict[str, Any]:
    asked = {"messages": MESSAGES} if path == CHAT else {"prompt": "hello"}
    return {"model": "tiny", **asked, "stream": True, "max_tokens": 12, **fields}


def two_engines(start_stack: StartStack, *die_after: int) -> Stack:
    stack = start_stack(num_decode=1 + len(die_after))
    for i, engine in enumerate(stack.decode):
        engine.behaviour = generate(f"id-{100 + i}", die_after[i] if i < len(die_after) else None)
    return stack


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (COMPLETIONS, {}),
        (COMPLETIONS, {"prompt": [5, 6, 7], "stream_options": USAGE}),
        (COMPLETIONS, {"return_token_ids": True, "prompt": [5]}),
        (COMPLETIONS, {"max_tokens": None}),
        (CHAT, {}),
        (CHAT, {"prompt": [1, 2]}),  # a field of the other API says nothing about a chat
        (CHAT, {"max_completion_tokens": 9, "max_tokens": None, "stream_options": USAGE, "temperature": 0, "seed": 3}),
    ],
)
@pytest.mark.parametrize("die_after", [1, 2, 5])
def test_the_client_gets_what_one_engine_would_have_sent(
    start_stack: StartStack, path: str, fields: dict[str, Any], die_after: int
) -> None:
    stack = two_engines(start_stack, die_after)
    asked = body(path, **fields)
    answer = stack.router.call("POST", path, asked)
    assert answer.status == 200
    got = [orjson.loads(line[6:]) for line in answer.body.splitlines() if line.startswith(b"data: {")]
    plain = [orjson.loads(event[6:]) for event in events_of(path, asked, "id-100")[:-1]]
    if path == CHAT:  # a field that says nothing, and that the API of completions has not
        for chunk in plain:
            for choice in chunk["choices"]:
                choice.pop("token_ids", None)
        for chunk in got:
            for choice in chunk["choices"]:
                choice.pop("token_ids", None)
    else:
        for chunk in (*plain, *got):
            for choice in chunk["choices"]:
                choice.pop("prompt_token_ids", None)
    assert got == plain
    assert answer.body.endswith(b"data: [DONE]\n\n")
    assert stack.router.record(answer)["num_continuations"] == 1
    assert stack.router.metric("tknp_stream_continuations_total") == 1
    wait_for(stack.router.is_idle)


def test_a_stream_may_change_engines_more_than_once(start_stack: StartStack) -> None:
    stack = two_engines(start_stack, 3, 4)
    asked = body(CHAT, stream_options=USAGE)
    answer = stack.router.call("POST", CHAT, asked)
    texts = [
        choice["delta"].get("content", "")
        for line in answer.body.splitlines()
        if line.startswith(b"data: {")
        for choice in orjson.loads(line[6:])["choices"]
    ]
    plain = [orjson.loads(event[6:]) for event in events_of(CHAT, asked, "id-100")[:-1]]
    assert "".join(texts) == "".join(c["delta"]["content"] for chunk in plain for c in chunk["choices"])
    usage = orjson.loads(answer.body.splitlines()[-4][6:])["usage"]
    assert usage == plain[-1]["usage"]


def test_without_a_death_the_stream_is_byte_for_byte_the_engine_s(stack: Stack) -> None:
    for path in (COMPLETIONS, CHAT):
        stack.decode[0].behaviour = generate("id-100")
        asked = body(path, stream_options=USAGE)
        assert stack.router.call("POST", path, asked).body == b"".join(events_of(path, asked, "id-100"))


def test_the_rest_is_prefilled_again_and_asked_for_in_tokens(start_stack: StartStack) -> None:
    stack = two_engines(start_stack, 5)
    stack.router.call("POST", CHAT, body(CHAT))
    first, rest = stack.prefill[0].seen
    assert (first.path, rest.path) == (CHAT, COMPLETIONS)
    sent = [ord(char) for char in "hello"]
    tokens = rest.body["prompt"][len(sent) :]
    assert rest.body["prompt"][: len(sent)] == sent
    assert len(tokens) == 4, "five events, the first of which only says whose turn it is"
    (decode,) = stack.decode[1].seen
    assert decode.body["prompt"] == rest.body["prompt"]
    assert decode.body["max_tokens"] == 12 - 4
    assert "messages" not in decode.body


def assert_error_event(answer: Any) -> None:
    assert answer.status == 200
    assert b'data: {"error"' in answer.body
    assert b"[DONE]" not in answer.body


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": ["x"]},
        {"seed": 1},
        {"seed": 1, "temperature": 0.5},
        {"n": 2},
        {"logprobs": 0},
        {"presence_penalty": 0.5},
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"regex": "a+"}},
        {"echo": True},
        {"something_that_nobody_knows": 1},
    ],
)
def test_what_another_engine_could_not_go_on_with_ends_with_an_error_event(
    start_stack: StartStack, fields: dict[str, Any]
) -> None:
    stack = two_engines(start_stack, 3)
    assert_error_event(stack.router.call("POST", COMPLETIONS, body(COMPLETIONS, **fields)))
    assert not stack.decode[1].seen


def test_it_can_be_switched_off(start_stack: StartStack) -> None:
    stack = start_stack(num_decode=2, continue_streams=False)
    for i in (0, 1):
        stack.decode[i].behaviour = generate("id-100", die_after=3)
    assert_error_event(stack.router.call("POST", COMPLETIONS, body(COMPLETIONS)))
    assert "return_token_ids" not in stack.decode[0].seen[0].body


def test_without_another_engine_the_stream_ends_with_an_error_event(start_stack: StartStack) -> None:
    stack = start_stack()
    stack.decode[0].behaviour = generate("id-100", die_after=3)
    assert_error_event(stack.router.call("POST", COMPLETIONS, body(COMPLETIONS)))


def test_an_answer_that_was_complete_but_for_its_end_is_not_continued(start_stack: StartStack) -> None:
    stack = two_engines(start_stack, 12)  # every token is out, [DONE] is not
    assert_error_event(stack.router.call("POST", COMPLETIONS, body(COMPLETIONS)))
    assert not stack.decode[1].seen


@pytest.mark.parametrize(
    "chunk",
    [
        b'data: {"id":"c","choices":[{"index":0,"delta":{"reasoning":"hm"},"token_ids":[1]}]}\n\n',
        b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"hm"}}]}\n\n',
    ],
    ids=["reasoning", "no ids"],
)
def test_a_stream_whose_state_is_not_known_is_not_continued(start_stack: StartStack, chunk: bytes) -> None:
    stack = start_stack(num_decode=2)
    stack.decode[0].behaviour = raw_stream(chunk, then="close")
    assert_error_event(stack.router.call("POST", CHAT, body(CHAT)))


def transcript(**fields: Any) -> Transcript:
    return Transcript(parse_request(Api.COMPLETIONS, orjson.dumps(body(COMPLETIONS, **fields)), "r"))


def test_a_text_that_looks_like_ids_is_left_alone() -> None:
    text = orjson.dumps('","token_ids":[1,2],"x":"')
    event = b'data: {"choices":[{"index":0,"text":%b,"token_ids":[7]}]}\n\n' % text
    made = transcript()
    assert made.take(event) == event.replace(b'"token_ids":[7]', b'"token_ids":null')
    rest = made.remaining([1], 100)
    assert rest is not None
    assert rest.body["prompt"] == [1, 7]


def test_min_tokens_shrinks_too() -> None:
    made = transcript(min_tokens=5, max_tokens=8)
    made.take(b'data: {"choices":[{"text":"ab","token_ids":[3,4]}]}\n\n')
    rest = made.remaining([1], 100)
    assert rest is not None
    assert (rest.body["min_tokens"], rest.body["max_tokens"]) == (3, 6)


def test_a_request_that_is_not_streamed_has_nothing_to_continue() -> None:
    request = parse_request(Api.COMPLETIONS, orjson.dumps({"model": "m", "prompt": "p"}), "r")
    assert not can_continue(request)
