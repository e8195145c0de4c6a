"""A stream whose engine dies goes on with another one, and the client sees no break."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import orjson
import pytest
from aiohttp import web

from router.continuation import AnswerEnded, Transcript
from router.errors import StreamBroken
from router.stream_fields import CantContinue
from router.types import Api
from router.validation import parse_request
from tests.router.conftest import Stack, StartStack
from tests.router.generating_engine import EURO, answer_of, decode, events_of, generate, prompt_ids
from tests.router.running import WAIT, wait_for
from tests.router.scripted_engine import KV_PARAMS, ScriptedEngine, Seen, stall

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


def chunks_of(answer: bytes) -> list[dict[str, Any]]:
    return [orjson.loads(line[6:]) for line in answer.splitlines() if line.startswith(b"data: {")]


def is_empty(chunk: dict[str, Any]) -> bool:
    return b'"finish_reason":null' in orjson.dumps(chunk) and not any(
        c.get("text") or c.get("delta", {}).get("content") or c.get("logprobs") or c.get("token_ids")
        for c in chunk["choices"]
    )


def same_but_for_ids(path: str, answer: bytes, plain: list[bytes]) -> None:
    """Fields that say nothing, and that the API of completions has not or has twice, may differ. So may chunks without
    anything: those of tokens whose text was not whole, and which were therefore generated again."""
    got, wanted = ([c for c in chunks_of(stream) if not is_empty(c)] for stream in (answer, b"".join(plain)))
    for chunk in (*got, *wanted):
        for choice in chunk["choices"]:
            choice.pop("token_ids" if path == CHAT else "prompt_token_ids", None)
    assert got == wanted
    assert answer.endswith(b"data: [DONE]\n\n")


STOPS = {"stop": ["xyzzy-never", "qq"]}  # up to ten characters are held back
CONTINUED: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {}),
    (COMPLETIONS, {"prompt": [5, 6, 7], "stream_options": USAGE}),
    (COMPLETIONS, {"return_token_ids": True, "prompt": [5]}),
    (COMPLETIONS, {"max_tokens": None}),
    (COMPLETIONS, {"logprobs": 2}),
    (COMPLETIONS, {"prompt": "é", "max_tokens": 30}),  # every third token or so begins a character of three
    (COMPLETIONS, {"prompt": "é", "max_tokens": 30, "temperature": 0, "logprobs": 1, "return_token_ids": True}),
    (COMPLETIONS, {"prompt": [ord("é"), EURO[0]], "max_tokens": 30, "include_stop_str_in_output": True}),
    (COMPLETIONS, {"prompt": ["é"], "max_tokens": 40, "stop": "xyz", "stream_options": USAGE}),
    (COMPLETIONS, {"max_tokens": 30, **STOPS}),
    (COMPLETIONS, {"max_tokens": 30, "prompt": "ø", **STOPS}),  # every fourth token or so is a special one
    (COMPLETIONS, {"max_tokens": 30, "prompt": "ø", "include_stop_str_in_output": True, **STOPS}),
    (COMPLETIONS, {"max_tokens": 40, "prompt": "éø", **STOPS}),
    (COMPLETIONS, {"repetition_penalty": 1.1, "cache_salt": "s", "response_format": {"type": "text"}}),
    (COMPLETIONS, {"max_tokens": 30, "stop_token_ids": [109], "min_tokens": 7, "stop": ["never"]}),
    (CHAT, {}),
    (CHAT, {"prompt": [1, 2]}),  # a field of the other API says nothing about a chat
    (CHAT, {"max_completion_tokens": 9, "max_tokens": None, "stream_options": USAGE, "temperature": 0, "seed": 3}),
    (CHAT, {"logprobs": True, "top_logprobs": 3}),
    (CHAT, {"logprobs": True}),
    (CHAT, {"max_tokens": 30, "messages": [{"role": "user", "content": "ø"}], **STOPS}),
    (CHAT, {"max_tokens": 30, "tools": [{"type": "function"}], "tool_choice": "none", **STOPS}),
]


def has_text(event: bytes) -> bool:
    return any(c.get("text") or c.get("delta", {}).get("content") for e in chunks_of(event) for c in e["choices"])


@pytest.mark.parametrize(("path", "fields"), CONTINUED[::2])
def test_the_client_gets_what_one_engine_would_have_sent(
    start_stack: StartStack, path: str, fields: dict[str, Any]
) -> None:
    asked = body(path, **fields)
    plain = events_of(path, asked, "id-100")
    die_after = list(map(has_text, plain)).index(True) + 3
    stack = two_engines(start_stack, die_after)
    answer = stack.router.call("POST", path, asked)
    assert answer.status == 200
    same_but_for_ids(path, answer.body, plain)
    assert stack.router.record(answer)["num_continuations"] == 1
    assert stack.router.metric("tknp_stream_continuations_total") == 1
    wait_for(stack.router.is_idle)


def begun(path: str, asked: dict[str, Any], num_events: int) -> tuple[Transcript, bytes]:
    """A stream up to its engine's death, and what the client has of it."""
    made = Transcript(parse_request(Api(path), orjson.dumps(asked), "r"))
    events = events_of(path, {**asked, "return_token_ids": True}, "id-100")
    return made, b"".join(map(made.take, events[:num_events]))


async def text_of_ids(ids: list[int]) -> str:
    return decode(ids)


def go_on(made: Transcript, path: str, asked: dict[str, Any], num_events: int | None = None) -> bytes:
    """What the client gets of another engine, which may die too."""
    if (ending := made.ending()) is not None:
        return ending
    rest = asyncio.run(made.remaining(prompt_ids(path, asked), 1000, text_of_ids))
    got = b""
    with suppress(AnswerEnded):
        for event in events_of(COMPLETIONS, {**rest.body, "return_token_ids": True}, "id-101")[:num_events]:
            got += made.take(event)
    return got if num_events is None else got + go_on(made, path, asked)


def broken_after(path: str, asked: dict[str, Any], *num_events: int) -> bytes:
    made, got = begun(path, asked, num_events[0])
    return got + go_on(made, path, asked, *num_events[1:])


@pytest.mark.parametrize(("path", "fields"), CONTINUED)
def test_wherever_it_breaks(path: str, fields: dict[str, Any]) -> None:
    asked = body(path, **fields)
    plain = events_of(path, asked, "id-100")
    for num_events in range(list(map(has_text, plain)).index(True) + 1, len(plain)):
        same_but_for_ids(path, broken_after(path, asked, num_events), plain)
        same_but_for_ids(path, broken_after(path, asked, num_events, 4), plain)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (COMPLETIONS, {}),
        (COMPLETIONS, {"logprobs": 1, "return_token_ids": True}),
        (COMPLETIONS, {"include_stop_str_in_output": True}),
        (COMPLETIONS, {"min_tokens": 24}),
        (CHAT, {"logprobs": True}),
    ],
)
def test_a_stop_string_may_begin_on_one_engine_and_end_on_another(path: str, fields: dict[str, Any]) -> None:
    text = decode(answer_of([ord(char) for char in "hello"], 40))
    stops = [text[20:26], text[23:25] + "?", text[30:33]]
    asked = body(path, max_tokens=40, stop=stops, stream_options=USAGE, **fields)
    plain = events_of(path, asked, "id-100")
    assert b'"stop_reason":"%b"' % stops[0].encode() in plain[-3] or "min_tokens" in fields
    for num_events in range(list(map(has_text, plain)).index(True) + 1, len(plain)):
        same_but_for_ids(path, broken_after(path, asked, num_events), plain)


def test_a_stream_without_its_end_alone_needs_no_engine(start_stack: StartStack) -> None:
    asked = body(CHAT, stream_options=USAGE)
    plain = events_of(CHAT, asked, "id-100")
    stack = two_engines(start_stack, len(plain) - 2)  # every token is out, usage and [DONE] are not
    answer = stack.router.call("POST", CHAT, asked)
    same_but_for_ids(CHAT, answer.body, plain)
    assert not stack.decode[1].seen
    assert stack.router.record(answer)["outcome"] == "ok"


def test_cached_tokens_are_those_of_the_first_engines(start_stack: StartStack) -> None:
    stack = start_stack(num_decode=2)
    for i, engine in enumerate(stack.decode):
        engine.behaviour = generate(f"id-{100 + i}", (4, None)[i])
    told = iter((2, 5))

    async def prefill(engine: ScriptedEngine, request: web.Request, seen: Seen) -> web.StreamResponse:
        return web.json_response({"kv_transfer_params": {**KV_PARAMS, "remote_prefill_cached_tokens": next(told)}})

    stack.prefill[0].behaviour = prefill
    answer = stack.router.call("POST", COMPLETIONS, body(COMPLETIONS, stream_options=USAGE))
    assert stack.router.record(answer)["num_continuations"] == 1
    usage = chunks_of(answer.body)[-1]["usage"]
    assert usage == {
        "prompt_tokens": 5,
        "completion_tokens": 12,
        "total_tokens": 17,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_until_an_answer_begins_another_engine_can_take_all_of_it(start_stack: StartStack) -> None:
    """Whatever it asks for: chat's first event, with the role, is nothing of the answer."""
    stack = two_engines(start_stack, 1)
    asked = body(CHAT, seed=1, presence_penalty=0.5, tools=[{"type": "function"}])
    answer = stack.router.call("POST", CHAT, asked)
    assert answer.body == b"".join(events_of(CHAT, asked, "id-101"))
    assert stack.router.record(answer)["num_continuations"] == 0


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
    ("fields", "reason"),
    [
        ({"seed": 1}, "seed"),
        ({"seed": 1, "temperature": 0.5}, "seed"),
        ({"n": 2}, "several_answers"),
        ({"presence_penalty": 0.5}, "penalty"),
        ({"frequency_penalty": -0.5}, "penalty"),
        ({"response_format": {"type": "json_object"}}, "structured_output"),
        ({"structured_outputs": {"regex": "a+"}}, "structured_output"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "media"),
        ({"echo": True}, "field"),
        ({"bad_words": ["hm"]}, "field"),
        ({"something_that_nobody_knows": 1}, "field"),
    ],
)
def test_what_another_engine_could_not_go_on_with(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(CantContinue) as found:
        begun(CHAT, body(CHAT, **fields), 0)
    assert found.value.reason == reason


def test_why_a_stream_is_not_continued_is_told(start_stack: StartStack) -> None:
    stack = two_engines(start_stack, 3)
    answer = stack.router.call("POST", COMPLETIONS, body(COMPLETIONS, the_client_s_word=1))
    assert_error_event(answer)
    assert not stack.decode[1].seen
    message = chunks_of(answer.body)[-1]["error"]["message"]
    assert message.endswith("depend on the answer's beginning: the_client_s_word. Please retry the request.")
    assert stack.router.metric("tknp_stream_continuations_refused_total", reason="field") == 1
    logged = stack.router.record(answer)["error"]
    assert "depend on the answer's beginning" in logged
    assert "the_client_s_word" not in logged


def test_a_client_that_hangs_up_while_its_stream_changes_engines(start_stack: StartStack) -> None:
    stack = two_engines(start_stack, 3)
    stack.decode[1].behaviour = stall
    with stack.router.open_stream(max_tokens=12):
        wait_for(lambda: stack.decode[1].seen)
    assert stack.decode[1].seen[0].cancelled.wait(WAIT)
    wait_for(stack.router.is_idle)


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


ROLE = b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
REASONING = b'{"index":0,"delta":{"reasoning":"hm"},"token_ids":[97]}'
CONTENT = b'{"index":0,"delta":{"content":"b"},"token_ids":[98]}'


def chat_events(*choices: bytes) -> bytes:
    events = [b'data: {"id":"c","choices":[%b],"prompt_token_ids":[1,2]}\n\n' % choices[0]]
    return b"".join(events + [b'data: {"id":"c","choices":[%b]}\n\n' % choice for choice in choices[1:]])


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        ([ROLE, REASONING], "reasoning"),
        ([ROLE, REASONING, CONTENT, REASONING], "reasoning"),
        ([ROLE, CONTENT.replace(b'"b"', b'""')], "reasoning"),  # perhaps: it can't be told yet
        ([ROLE, b'{"index":0,"delta":{"content":"hm"}}'], "no_ids"),
        ([CONTENT], "prompt"),  # it is not the one that /tokenize gives
    ],
)
def test_a_stream_whose_state_is_not_known_is_not_continued(choices: list[bytes], reason: str) -> None:
    made = Transcript(parse_request(Api.CHAT, orjson.dumps(body(CHAT)), "r"))
    for choice in [chat_events(*choices)]:
        made.take(choice)
    with pytest.raises(CantContinue) as found:
        asyncio.run(made.remaining([1, 2 if reason != "prompt" else 3], 1000, text_of_ids))
    assert found.value.reason == reason


def test_after_its_reasoning_an_answer_is_plain_text_again() -> None:
    made = Transcript(parse_request(Api.CHAT, orjson.dumps(body(CHAT)), "r"))
    for event in chat_events(ROLE, REASONING, CONTENT).splitlines(keepends=True):
        made.take(event + b"\n")
    rest = asyncio.run(made.remaining([1, 2], 1000, text_of_ids))
    assert rest.body["prompt"] == [1, 2, 97, 98]


SHOWN: list[dict[str, Any]] = [{"return_token_ids": True}, {"logprobs": 1}]


@pytest.mark.parametrize("fields", SHOWN)
def test_the_tokens_of_half_a_character_that_the_client_has_seen(fields: dict[str, Any]) -> None:
    """They are generated again, which is exact where no chance is in it."""
    asked = body(COMPLETIONS, prompt="é", max_tokens=30, **fields)
    within = list(map(has_text, events_of(COMPLETIONS, asked, "id-100"))).index(False) + 1
    with pytest.raises(CantContinue) as found:
        broken_after(COMPLETIONS, asked, within)
    assert found.value.reason == "text"
    made, _ = begun(COMPLETIONS, {**asked, "temperature": 0}, within)
    rest = asyncio.run(made.remaining([ord("é")], 1000, text_of_ids))
    events = events_of(COMPLETIONS, {**rest.body, "prompt": [1], "return_token_ids": True}, "id-101")
    with pytest.raises(StreamBroken):  # if it was not exact after all
        for event in events:
            made.take(event)


def test_a_text_that_looks_like_ids_is_left_alone() -> None:
    made = Transcript(parse_request(Api.COMPLETIONS, orjson.dumps(body(COMPLETIONS)), "r"))
    text = orjson.dumps('","token_ids":[1,2],"x":"')
    event = b'data: {"choices":[{"index":0,"text":%b,"prompt_token_ids":[1],"token_ids":[7]}]}\n\n' % text
    assert made.take(event) == event.replace(b'"token_ids":[7]', b'"token_ids":null').replace(b":[1]", b":null")
    assert asyncio.run(made.remaining([1], 100, text_of_ids)).body["prompt"] == [1, 7]


def test_min_tokens_shrinks_too() -> None:
    asked = body(COMPLETIONS, min_tokens=5, max_tokens=8)
    made, _ = begun(COMPLETIONS, asked, 2)
    rest = asyncio.run(made.remaining(prompt_ids(COMPLETIONS, asked), 100, text_of_ids))
    assert (rest.body["min_tokens"], rest.body["max_tokens"]) == (3, 6)
