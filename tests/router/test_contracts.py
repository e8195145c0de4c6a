"""What the router takes for granted of vLLM and uvicorn: when one of them moves, this fails first and says what."""

from __future__ import annotations

import asyncio
import inspect
import warnings
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from router.legs import decode_body, prefill_body, release_body
from router.types import Api, GenerationRequest
from router.validation import parse_request

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from vllm import envs
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse

PARAMS = {"do_remote_prefill": True, "do_remote_decode": False}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

COMPLETIONS: list[dict[str, Any]] = [
    {"prompt": "hi"},
    {"prompt": [1, 2], "max_tokens": 64, "min_tokens": 8, "n": 4, "stop": ["a"], "seed": -(2**63)},
    {"prompt": "hi", "logprobs": 3, "logprob_token_ids": [1, 2], "max_tokens": None},
    {"prompt": "hi", "stream": True, "stream_options": {"include_usage": True}, "temperature": 2, "top_p": 1},
    {"prompt": "hi", "echo": True, "max_tokens": 4},
]
CHATS: list[dict[str, Any]] = [
    {},
    {"max_completion_tokens": 64, "min_tokens": 8, "n": 4},
    {"max_tokens": 64, "logprobs": True, "top_logprobs": 3, "logprob_token_ids": [1]},
    {"stream": True, "stream_options": {"include_usage": True}},
    {"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}},
]


def accepted(api: Api, fields: dict[str, Any]) -> GenerationRequest:
    base: dict[str, Any] = {"model": "m"}
    if api is Api.CHAT:
        base["messages"] = [{"role": "user", "content": "hi"}]
    return parse_request(api, orjson.dumps({**base, **fields}), "id")


@pytest.mark.parametrize(
    ("api", "fields"), [(Api.COMPLETIONS, f) for f in COMPLETIONS] + [(Api.CHAT, f) for f in CHATS]
)
def test_vllm_takes_both_legs_of_what_we_accept(api: Api, fields: dict[str, Any]) -> None:
    model = CompletionRequest if api is Api.COMPLETIONS else ChatCompletionRequest
    request = accepted(api, fields)
    leg = vars(model.model_validate_json(prefill_body(request, "lease")))  # vars: reading chat's max_tokens warns
    assert (leg["n"], leg["max_tokens"], leg["stream"]) == (1, 1, False)
    assert leg["kv_transfer_params"]["do_remote_decode"] is True
    assert leg["kv_transfer_params"]["tknp_lease_id"] == "lease"
    if api is Api.CHAT and "max_completion_tokens" in fields:
        assert leg["max_completion_tokens"] == 1
    leg = vars(model.model_validate_json(decode_body(request, PARAMS, with_ids=True)))
    assert leg["kv_transfer_params"] == {**PARAMS, "tknp_request_id": "id", "tknp_num_readers": request.num_choices}
    assert leg["return_token_ids"] is True
    for name in ("n", "seed", "min_tokens", "logprobs", "stream", "echo"):
        assert name not in fields or leg[name] == fields[name]


def test_a_rejected_request_releases_its_kv_cache() -> None:
    """What leases.py relies on."""
    released: list[dict[str, Any]] = []

    async def notify(request_id: str, params: dict[str, Any], **_: Any) -> None:
        released.append(params)

    async def reject() -> Any:
        return ErrorResponse(error=ErrorInfo(message="no such model", type="x", code=404))

    serving = SimpleNamespace(
        has_kv_connector=True,
        engine_client=SimpleNamespace(notify_kv_transfer_request_rejected=notify),
        _get_data_parallel_rank=lambda raw: None,
    )
    request = CompletionRequest.model_validate_json(release_body(PARAMS))
    asyncio.run(GenerateBaseServing._with_kv_transfer_rejection_cleanup(serving, reject(), request, None))
    assert released == [PARAMS]


def test_vllm_takes_the_request_id_from_our_header() -> None:
    assert "X-Request-Id" in inspect.getsource(GenerateBaseServing._base_request_id)


def test_vllm_keeps_idle_connections_longer_than_we_do() -> None:
    assert envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE > 2


@pytest.mark.parametrize("name", ["data_received", "on_headers_complete", "on_message_complete", "send_400_response"])
def test_uvicorn_has_the_callbacks_that_the_header_limit_hooks(name: str) -> None:
    assert callable(getattr(HttpToolsProtocol, name, None))
