"""Bad input is named in OpenAI's error body, and nothing of it reaches an engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from router.errors import InvalidRequest
from router.types import Api, LocalPrefill
from router.validation import parse_request
from tests.router.conftest import Stack
from tests.router.scripted_engine import MODEL

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}

INT_ABOVE_64_BITS = 2**63

BAD_COMPLETIONS: dict[str, list[Any]] = {
    "model": [None, "", 3, ["tiny"]],
    "prompt": [
        *(None, "", [], [[]], [""], [1, "a"], [True], [-1], [1.5], [[1], "a"], {"a": 1}, 7, [None]),
        *([INT_ABOVE_64_BITS], [[1, -2]]),
    ],
    "max_tokens": [0, -1, 1.5, "5", True, INT_ABOVE_64_BITS, 5000],
    "n": [0, -1, 129, 1.0, "2", True],
    "stream": [1, "true", []],
    "temperature": [-0.1, 2.1, "1", True, []],
    "top_p": [0, 1.1, -1, "1", False],
    "seed": [1.5, "1", True, INT_ABOVE_64_BITS],
    "stop": [1, "", [""], [1], {"a": 1}],
    "logprobs": [True, -2, "1", 1.5],
    "echo": [1, "yes"],
    "presence_penalty": [-3, 3, "0"],
    "frequency_penalty": [-3, 3, "0"],
    "best_of": [0, "2"],
    "min_tokens": [-1, "2"],
    "stream_options": [{"include_usage": True}, True],
    "kv_transfer_params": [{"remote_host": "10.0.0.1"}, None],
    "ec_transfer_params": [{"a": 1}],
}
BAD_RESPONSES: dict[str, list[Any]] = {
    "input": [None, [], {}, 1, ["hi"], [[]]],
    "max_output_tokens": [0, -1, "5", 1.5, 5000],
    "top_logprobs": [-1, 21, True],
    "store": ["yes", 1],
    "background": [True, "yes"],
    "previous_response_id": ["resp_1", False, 0],
    "conversation": ["conv_1", {"id": "conv_1"}, 0],
    "kv_transfer_params": [{"remote_host": "10.0.0.1"}],
    "stream_options": [{"include_usage": True}],
}
BAD_CHATS: dict[str, list[Any]] = {
    "messages": [None, [], {}, "hi", ["hi"], [{}], [{"role": 1}], [None]],
    "max_completion_tokens": [0, -1, "5", 5000],
    "max_tokens": [0, -1],
    "logprobs": [1, "true"],
    "top_logprobs": [True, -2, "1"],
}


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(name, v, id=f"{name}={v!r}"[:40]) for name, values in table.items() for v in values]


@pytest.fixture(scope="module")
def calm(loop_of_engines: Any) -> Any:
    """One stack for all cases: none of them changes it."""
    from tests.router.conftest import start_stack

    generator = start_stack.__wrapped__(loop_of_engines)  # type: ignore[attr-defined]
    yield next(generator)()
    generator.close()


@pytest.mark.parametrize(("field", "value"), cases(BAD_COMPLETIONS))
def test_bad_completion(calm: Stack, field: str, value: Any) -> None:
    answer = calm.router.complete(**{field: value})
    assert answer.status == 400, answer.body
    assert answer.error["type"] == "invalid_request_error"
    assert answer.error["param"].startswith(field)
    assert field in answer.error["message"]
    assert calm.num_seen == 0


@pytest.mark.parametrize(("field", "value"), cases(BAD_CHATS))
def test_bad_chat(calm: Stack, field: str, value: Any) -> None:
    answer = calm.router.chat(**{field: value})
    assert answer.status == 400, answer.body
    assert answer.error["param"].startswith(field)
    assert calm.num_seen == 0


@pytest.mark.parametrize(("field", "value"), cases(BAD_RESPONSES))
def test_bad_response(calm: Stack, field: str, value: Any) -> None:
    answer = calm.router.call("POST", "/v1/responses", {"model": MODEL, "input": "hi", field: value})
    assert answer.status == 400, answer.body
    assert answer.error["param"].startswith(field)
    assert calm.num_seen == 0


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"model": "\xc3\x28", "prompt": "hi"}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "hi", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "hi", "temperature": Infinity}',
        b'{"model": "tiny", "prompt": "hi", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": "hi", "max_tokens": 1' + b"0" * 5000 + b"}",
        b'{"model": "tiny", "prompt": "hi", "x": ' + b"[" * 300 + b"]" * 300 + b"}",
        b'{"model": "tiny", "prompt": "hi", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": "tiny", "prompt": "hi"} trailing',
        b'{"model": "tiny", "prompt": "hi", "seed": -9223372036854775809}',
        b'{"model": "tiny", "prompt": "hi", "kv\\u005ftransfer_params": {"remote_host": "x"}}',
        b'{"model": "tiny", "prompt": "hi", "vllm_xargs": {"kv_transfer_params": "x"}}',
    ],
    ids=lambda raw: repr(raw[:60]),
)
def test_bad_bodies(calm: Stack, raw: bytes) -> None:
    answer = calm.router.call("POST", "/v1/completions", raw)
    assert answer.status == 400, answer.body
    assert answer.error["message"]
    assert calm.num_seen == 0


def test_unknown_model(calm: Stack) -> None:
    answer = calm.router.complete(model="gpt-9")
    assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "model_not_found", "model")
    assert MODEL in answer.error["message"]
    assert calm.num_seen == 0


def test_too_many_tokens_names_both_numbers(calm: Stack) -> None:
    message = calm.router.complete(max_tokens=5000).error["message"]
    assert "5000" in message
    assert "4096" in message


BASES: dict[Api, dict[str, Any]] = {Api.COMPLETIONS: {"prompt": "hi"}, Api.CHAT: CHAT, Api.RESPONSES: {"input": "hi"}}


def parse(api: Api = Api.COMPLETIONS, **fields: Any) -> LocalPrefill | None:
    return parse_request(api, json.dumps({"model": "m", **BASES[api], **fields}).encode(), "id").local_prefill


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"tools": [{"type": "function", "name": "f"}, {"type": "custom", "name": "g"}]}, None),
        ({"tools": [{"type": "function", "name": "f"}, {"type": "web_search_preview"}]}, LocalPrefill.BUILTIN_TOOLS),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, LocalPrefill.BUILTIN_TOOLS),
        ({"truncation": "disabled"}, None),
        ({"truncation": "auto"}, LocalPrefill.TRUNCATION),
        ({"truncation": None}, LocalPrefill.TRUNCATION),
        ({"background": False, "store": True}, None),
    ],
)
def test_which_responses_a_decode_engine_prefills_itself(fields: dict[str, Any], reason: LocalPrefill | None) -> None:
    assert parse(Api.RESPONSES, **fields) is reason


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"prompt": [1, 2, 3]}, None),
        ({"prompt": ["one"]}, None),
        ({"prompt": [[1, 2]]}, None),
        ({"prompt": ["one", "two"]}, LocalPrefill.SEVERAL_PROMPTS),
        ({"prompt": [[1], [2]]}, LocalPrefill.SEVERAL_PROMPTS),
        ({"prompt_embeds": "AAAA", "prompt": None}, LocalPrefill.PROMPT_EMBEDS),
        ({"prompt_embeds": "AAAA", "prompt": "hi"}, LocalPrefill.PROMPT_EMBEDS),
        ({"echo": True}, None),
        ({"echo": True, "logprobs": 0}, LocalPrefill.ECHO_LOGPROBS),
        ({"echo": True, "max_tokens": 0}, LocalPrefill.NO_GENERATION),
        ({"prompt_logprobs": 0}, LocalPrefill.PROMPT_LOGPROBS),
        ({"use_beam_search": True}, LocalPrefill.BEAM_SEARCH),
        ({"best_of": 1}, None),
        ({"best_of": 2}, LocalPrefill.BEST_OF),
        ({"truncate_prompt_tokens": 10}, None),
        ({"truncate_prompt_tokens": -1}, LocalPrefill.TRUNCATION),
    ],
)
def test_what_a_decode_engine_prefills_itself(fields: dict[str, Any], reason: LocalPrefill | None) -> None:
    assert parse(**fields) is reason


@pytest.mark.parametrize(
    "field", ["temperature", "top_p", "n", "stop", "stream", "seed", "max_tokens", "stream_options"]
)
def test_null_is_the_same_as_absent(field: str) -> None:
    nothing: dict[str, Any] = {field: None}
    for api in Api:
        assert parse(api, **nothing) is None


def test_stream_options_with_a_stream_are_fine() -> None:
    assert parse(stream=True, stream_options={"include_usage": True}) is None


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(stop={"a": "x" * 10_000})
    assert len(caught.value.message) < 200
