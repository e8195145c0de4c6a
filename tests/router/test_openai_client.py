"""OpenAI's own client, unchanged, against the router."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import web
from openai import APIError, BadRequestError, NotFoundError, OpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from pydantic import BaseModel

from tests.router.answers import (
    DELTAS,
    PREAMBLE,
    WORDS,
    answer_response,
    chat_answer,
    chat_chunk,
    tool_call,
)
from tests.router.conftest import Stack, StartStack
from tests.router.running import wait_for
from tests.router.scripted_engine import (
    MODEL,
    Behaviour,
    ScriptedEngine,
    Seen,
    answer_decode,
    chunk,
    hang_up,
    raw_stream,
    status,
)

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


class City(BaseModel):
    name: str
    people: int


@pytest.fixture
def client(stack: Stack) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{stack.router.url}/v1", api_key="none", max_retries=0, timeout=30) as found:
        yield found


def always(body: dict[str, Any]) -> Behaviour:
    async def answer(engine: ScriptedEngine, request: web.Request, seen: Seen) -> web.StreamResponse:
        return web.json_response(body)

    return answer


def test_models(start_stack: StartStack) -> None:
    stack = start_stack(model_aliases={"gpt-4o": MODEL, "org/small": MODEL, "gone": "not-served"})
    with OpenAI(base_url=f"{stack.router.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [MODEL, "gpt-4o", "org/small"]
        assert client.models.retrieve(MODEL).id == MODEL
        assert client.models.retrieve("org/small").model_dump()["root"] == MODEL
        for name in ("gone", "never"):
            with pytest.raises(NotFoundError, match="is not served here") as caught:
                client.models.retrieve(name)
            assert caught.value.code == "model_not_found"


def test_an_alias_is_served_by_its_model_on_both_legs(start_stack: StartStack) -> None:
    stack = start_stack(model_aliases="gpt-4o=tiny, gpt-4 = tiny")
    with OpenAI(base_url=f"{stack.router.url}/v1", api_key="none", max_retries=0) as client:
        for name in ("gpt-4o", "gpt-4"):
            assert client.completions.create(model=name, prompt="hi").model == MODEL
    assert {seen.body["model"] for engine in stack.prefill + stack.decode for seen in engine.seen} == {MODEL}


def test_chat_with_usage(stack: Stack, client: OpenAI) -> None:
    stack.decode[0].behaviour = always(chat_answer({"content": "hello"}))
    whole = client.chat.completions.create(model=MODEL, messages=HELLO)
    assert whole.choices[0].message.content == "hello"
    assert whole.usage is not None and whole.usage.total_tokens == 12
    assert whole.usage.prompt_tokens_details is not None and whole.usage.prompt_tokens_details.cached_tokens == 4


def test_streamed_chat_with_usage(stack: Stack, client: OpenAI) -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
    pieces = [chat_chunk({"content": word}) for word in WORDS]
    last = b"data: " + json.dumps({**json.loads(pieces[0][6:]), "choices": [], "usage": usage}).encode() + b"\n\n"
    stack.decode[0].behaviour = raw_stream(*pieces, last, b"data: [DONE]\n\n", then="end")
    stream = client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert [c.choices[0].delta.content for c in chunks[:-1]] == list(WORDS)
    assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens == 12
    assert stack.decode[0].seen[0].body["stream_options"] == {"include_usage": True}
    assert "stream_options" not in stack.prefill[0].seen[0].body


def test_tools(stack: Stack, client: OpenAI) -> None:
    call = tool_call('{"city":"Paris"}', id="call_1")
    stack.decode[0].behaviour = always(chat_answer({"content": None, "tool_calls": [call]}, "tool_calls"))
    whole = client.chat.completions.create(model=MODEL, messages=HELLO, tools=[WEATHER], tool_choice="required")
    calls = whole.choices[0].message.tool_calls
    assert calls is not None and calls[0].type == "function" and calls[0].function.arguments == '{"city":"Paris"}'
    for engine in (stack.prefill[0], stack.decode[0]):  # tools are part of the prompt, so both must see them
        assert engine.seen[0].body["tools"] == [WEATHER]


def test_streamed_tools(stack: Stack, client: OpenAI) -> None:
    pieces = [
        chat_chunk({"role": "assistant", "tool_calls": [tool_call("", index=0, id="call_1")]}),
        chat_chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"city":'}}]}),
        chat_chunk({"tool_calls": [{"index": 0, "function": {"arguments": '"Paris"}'}}]}, "tool_calls"),
    ]
    stack.decode[0].behaviour = raw_stream(*pieces, b"data: [DONE]\n\n", then="end")
    with client.chat.completions.stream(model=MODEL, messages=HELLO, tools=[WEATHER]) as stream:
        stream.until_done()
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.arguments == '{"city":"Paris"}'


def test_structured_output(stack: Stack, client: OpenAI) -> None:
    stack.decode[0].behaviour = always(chat_answer({"content": '{"name":"Paris","people":2100000}'}))
    whole = client.chat.completions.parse(model=MODEL, messages=HELLO, response_format=City)
    assert whole.choices[0].message.parsed == City(name="Paris", people=2_100_000)
    sent = stack.decode[0].seen[0].body["response_format"]
    assert sent["type"] == "json_schema" and sent["json_schema"]["name"] == "City"


def test_closing_a_stream_cancels_the_engine(stack: Stack, client: OpenAI) -> None:
    stack.decode[0].behaviour = raw_stream(*(chunk(i) for i in range(3000)), pause=0.01, then="stall")
    with client.completions.create(model=MODEL, prompt="hi", stream=True) as stream:
        assert next(iter(stream)).choices[0].text == "0 "
    assert stack.decode[0].seen[0].cancelled.wait(2)


def test_a_response(stack: Stack, client: OpenAI) -> None:
    stack.decode[0].behaviour = answer_response
    whole = client.responses.create(model=MODEL, input="hi", instructions="Be brief.", max_output_tokens=64, store=True)
    assert whole.output_text == "".join(WORDS)
    assert whole.usage is not None and whole.usage.input_tokens_details.cached_tokens == 4
    (prefill,), (decode,) = stack.prefill[0].seen, stack.decode[0].seen
    assert prefill.path == decode.path == "/v1/responses"
    assert (prefill.body["max_output_tokens"], prefill.body["stream"], prefill.body["store"]) == (1, False, False)
    assert prefill.body["kv_transfer_params"]["do_remote_decode"] is True
    assert "max_tokens" not in prefill.body
    assert decode.body["kv_transfer_params"]["do_remote_prefill"] is True
    assert (decode.body["max_output_tokens"], decode.body["store"]) == (64, False)
    assert decode.body["input"] == prefill.body["input"] == "hi"


def test_a_streamed_response(stack: Stack, client: OpenAI) -> None:
    stack.decode[0].behaviour = answer_response
    events = list(client.responses.create(model=MODEL, input="hi", stream=True))
    names = [found.type for found in events]
    deltas = ["response.output_text.delta"] * 3
    assert names == ["response.created", "response.in_progress", *deltas, "response.completed"]
    assert "".join(found.delta for found in events if found.type == "response.output_text.delta") == "".join(WORDS)
    wait_for(stack.router.is_idle)
    assert stack.router.metric("tknp_requests_total", endpoint="/v1/responses", outcome="ok") == 1


def test_a_response_has_one_reader_whatever_the_client_asks(stack: Stack) -> None:
    """vLLM ignores `n` there; KV cache kept for readers that never come would be held until its lease ends."""
    stack.decode[0].behaviour = answer_response
    assert stack.router.call("POST", "/v1/responses", {"model": MODEL, "input": "hi", "n": 3}).status == 200
    assert stack.decode[0].seen[0].body["kv_transfer_params"]["tknp_num_readers"] == 1


def test_a_preamble_is_no_token(start_stack: StartStack) -> None:
    """An engine sends it at once, and may then keep the request in its queue for long, or for ever."""
    stack = start_stack(first_token_timeout=1.0, num_retries=0)
    stack.decode[0].behaviour = raw_stream(PREAMBLE, then="stall")
    answer = stack.router.call("POST", "/v1/responses", {"model": MODEL, "input": "hi", "stream": True})
    assert (answer.status, answer.error["code"]) == (504, "engine_timeout")
    assert "first_token" not in stack.router.record(answer)["moments"]


def test_a_response_whose_engine_dies_before_the_first_token_goes_to_another(start_stack: StartStack) -> None:
    stack = start_stack(num_decode=2)
    num_asked = 0

    async def die_first(engine: ScriptedEngine, request: web.Request, seen: Seen) -> web.StreamResponse:
        nonlocal num_asked
        num_asked += 1
        behaviour = raw_stream(PREAMBLE, then="close") if num_asked == 1 else answer_response
        return await behaviour(engine, request, seen)

    for engine in stack.decode:
        engine.behaviour = die_first
    answer = stack.router.call("POST", "/v1/responses", {"model": MODEL, "input": "hi", "stream": True})
    assert answer.body.count(b"event: response.created") == 1
    assert answer.body.count(b"event: response.completed") == 1
    assert num_asked == 2


def test_a_response_that_breaks_off_ends_in_an_error(stack: Stack, client: OpenAI) -> None:
    stack.decode[0].behaviour = raw_stream(PREAMBLE, DELTAS[0], then="close")
    stream = client.responses.create(model=MODEL, input="hi", stream=True)
    names = []
    with pytest.raises(APIError, match="failed"):
        for found in stream:
            names.append(found.type)
    assert names[-1] == "response.output_text.delta"
    raw = stack.router.call("POST", "/v1/responses", {"model": MODEL, "input": "hi", "stream": True}).body
    name, data = raw.rstrip().rpartition(b"\n\n")[2].split(b"\n")
    told = json.loads(data.removeprefix(b"data: "))
    assert name == b"event: error"
    assert (told["type"], told["code"], told["error"]["code"]) == ("error", "engine_failure", "engine_failure")


@pytest.mark.parametrize("fields", [{"previous_response_id": "resp_1"}, {"background": True}, {"conversation": "c"}])
def test_what_needs_stored_responses_is_refused(stack: Stack, client: OpenAI, fields: dict[str, Any]) -> None:
    with pytest.raises(BadRequestError, match="none are stored here") as caught:
        client.responses.create(model=MODEL, input="hi", **fields)
    assert caught.value.param == next(iter(fields))
    assert stack.num_seen == 0


def test_stored_responses_are_not_found(client: OpenAI) -> None:
    for call in (client.responses.retrieve, client.responses.cancel, client.responses.delete):
        with pytest.raises(NotFoundError, match="none are stored here"):
            call("resp_1")


def test_embeddings_of_a_model_that_makes_none(stack: Stack, client: OpenAI) -> None:
    stack.decode[0].behaviour = status(404, b'{"error":{"message":"Not Found","type":"NotFoundError","code":404}}')
    with pytest.raises(BadRequestError, match="can't make embeddings") as caught:
        client.embeddings.create(model=MODEL, input="hi")
    assert (caught.value.code, caught.value.param) == ("unsupported_model", "model")
    assert not stack.prefill[0].seen


def test_embeddings_of_a_model_that_makes_them(stack: Stack, client: OpenAI) -> None:
    data = [{"object": "embedding", "index": 0, "embedding": [0.25, -0.5]}]
    usage = {"prompt_tokens": 2, "total_tokens": 2}
    stack.decode[0].behaviour = always({"object": "list", "model": MODEL, "data": data, "usage": usage})
    made = client.embeddings.create(model=MODEL, input="hi", encoding_format="float")
    assert made.data[0].embedding == [0.25, -0.5]
    with pytest.raises(BadRequestError, match="float or base64"):
        client.embeddings.create(model=MODEL, input="hi", encoding_format="bytes")  # type: ignore[arg-type]
    assert len(stack.decode[0].seen) == 1


def test_detokenizing_goes_to_an_engine_that_works(start_stack: StartStack) -> None:
    stack = start_stack(num_decode=2)
    num_asked = 0

    async def die_first(engine: ScriptedEngine, request: web.Request, seen: Seen) -> web.StreamResponse:
        nonlocal num_asked
        num_asked += 1
        return await (hang_up if num_asked == 1 else always({"prompt": "hi"}))(engine, request, seen)

    for engine in stack.decode:
        engine.behaviour = die_first
    answer = stack.router.call("POST", "/detokenize", {"tokens": [5]})
    assert (answer.status, answer.json()) == (200, {"prompt": "hi"})
    assert stack.decode[0].seen[-1].body == {"tokens": [5], "model": MODEL}
    assert not stack.prefill[0].seen
    wait_for(stack.router.is_idle)
    assert stack.router.metric("tknp_retries_total", role="decode") == 1


def test_detokenizing_without_a_model_is_no_guess(start_stack: StartStack) -> None:
    stack = start_stack(models_interval=0.1)
    stack.decode[0].models = [{"id": "a"}, {"id": "b"}]
    wait_for(lambda: len(stack.router.state.pool.models()) == 2)
    answer = stack.router.call("POST", "/detokenize", {"tokens": [1]})
    assert (answer.status, answer.error["param"]) == (400, "model")
    assert "a, b" in answer.error["message"]
    assert stack.num_seen == 0


def test_an_engines_refusal_of_a_task_passes(stack: Stack) -> None:
    stack.decode[0].behaviour = status(400)
    answer = stack.router.call("POST", "/detokenize", {"model": MODEL, "tokens": 1})
    assert (answer.status, answer.error["message"]) == (400, "scripted")
    stack.decode[0].behaviour = answer_decode
