"""What a request must look like before anything of it reaches an engine.

Only fields that the router or the hand-off depends on, and those whose bad values are easy to name, are checked. Every
other field passes through untouched: the engine knows best.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from router.aliases import resolve
from router.errors import InvalidRequest
from router.fields import (
    INT64,
    check_bool,
    check_input,
    check_int,
    check_messages,
    check_number,
    check_prompt,
    check_stop,
    refuse,
)
from router.types import Api, GenerationRequest, JsonObject, LocalPrefill

MAX_NUM_CHOICES = 128  # OpenAI's limit
# Both name hosts that an engine then connects to, so only the router may set them.
ROUTER_FIELDS = ("kv_transfer_params", "ec_transfer_params")


def parse_request(
    api: Api,
    raw: bytes,
    request_id: str,
    trace_headers: tuple[tuple[str, str], ...] = (),
    aliases: Mapping[str, str] = {},
) -> GenerationRequest:
    """Raises InvalidRequest."""
    body = parse_json(raw)
    refuse_router_fields(body)
    if aliases:
        resolve(body, aliases)
    model = body.get("model")
    if not isinstance(model, str) or not model:
        refuse("model", "the name of a model", model)
    stream = check_bool(body, "stream")
    _check_stream_options(body, stream)
    # The Responses API has no `n`: an engine that takes no notice of it reads the KV cache once.
    num_choices = 1 if api is Api.RESPONSES else check_int(body, "n", 1, MAX_NUM_CHOICES) or 1
    _check_sampling(body)
    local_prefill = _CHECKS[api](body)
    return GenerationRequest(
        request_id, api, body, model, stream, num_choices, local_prefill or _common_local_prefill(body), trace_headers
    )


def check_length(request: GenerationRequest, card: JsonObject) -> None:
    """Refuses more output tokens than the model's context holds: vLLM's own rule, before a prefill is spent on it."""
    limit = card.get("max_model_len")
    for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
        wanted = request.body.get(name)
        if isinstance(limit, int) and isinstance(wanted, int) and wanted > limit:
            raise InvalidRequest(
                f"{name} is {wanted}, but the model's context holds {limit} tokens, prompt included. Ask for fewer.",
                param=name,
            )


def parse_json(raw: bytes) -> JsonObject:
    try:
        body: Any = orjson.loads(raw)
        if isinstance(body, dict):
            orjson.dumps(body)  # what parses can be too deep to be written again: it must be, for each leg
    except (orjson.JSONDecodeError, orjson.JSONEncodeError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.", param=None) from error
    if not isinstance(body, dict):
        raise InvalidRequest(f"The body must be a JSON object, not {type(body).__name__}.")
    return body


def refuse_router_fields(body: JsonObject) -> None:
    extra = body.get("vllm_xargs")  # vLLM merges these into the same place
    for name in ROUTER_FIELDS:
        if name in body or (isinstance(extra, dict) and name in extra):
            raise InvalidRequest(f"{name} is set by the router and can't be part of a request. Remove it.", param=name)


def _check_stream_options(body: JsonObject, stream: bool) -> None:
    options = body.get("stream_options")
    if options is None:
        return
    if not isinstance(options, dict):
        refuse("stream_options", "an object", options)
    if not stream:
        raise InvalidRequest("stream_options needs stream=true.", param="stream_options")


def _check_sampling(body: JsonObject) -> None:
    check_number(body, "temperature", 0, 2)
    check_number(body, "top_p", 0, 1, low_is_allowed=False)
    check_number(body, "presence_penalty", -2, 2)
    check_number(body, "frequency_penalty", -2, 2)
    check_int(body, "seed", -INT64)
    check_int(body, "min_tokens", 0)
    check_int(body, "prompt_logprobs", -1)
    check_int(body, "truncate_prompt_tokens", -1)
    check_stop(body)


def _check_completion(body: JsonObject) -> LocalPrefill | None:
    echo = check_bool(body, "echo")
    # vLLM takes max_tokens=0 with echo only: the prompt comes back, nothing is generated.
    max_tokens = check_int(body, "max_tokens", 0 if echo else 1)
    logprobs = check_int(body, "logprobs", -1)
    prompt = body.get("prompt")
    has_embeds = body.get("prompt_embeds") is not None
    num_prompts = 0 if has_embeds and prompt is None else check_prompt(prompt)
    if has_embeds:
        return LocalPrefill.PROMPT_EMBEDS
    if num_prompts > 1:
        return LocalPrefill.SEVERAL_PROMPTS
    if echo and logprobs is not None:
        return LocalPrefill.ECHO_LOGPROBS
    return LocalPrefill.NO_GENERATION if max_tokens == 0 else None


def _check_chat(body: JsonObject) -> LocalPrefill | None:
    check_messages(body.get("messages"))
    check_int(body, "max_tokens", 1)
    check_int(body, "max_completion_tokens", 1)
    check_bool(body, "logprobs")
    check_int(body, "top_logprobs", -1)
    return None


# What the Responses API keeps between requests. Nothing is kept here: the next request may meet another engine.
_STORED = {
    "previous_response_id": "Send the earlier items of the conversation in input.",
    "conversation": "Send the earlier items of the conversation in input.",
    "background": "Leave it out and read the answer as a stream.",
}


def _check_responses(body: JsonObject) -> LocalPrefill | None:
    check_input(body.get("input"))
    check_int(body, "max_output_tokens", 1)
    check_int(body, "top_logprobs", 0, 20)
    check_bool(body, "store")
    check_bool(body, "background")
    for name, instead in _STORED.items():
        value = body.get(name)
        if value is not None and not (name == "background" and value is False):
            raise InvalidRequest(f"{name} needs stored responses, and none are stored here. {instead}", param=name)
    if has_builtin_tools(body.get("tools")):
        return LocalPrefill.BUILTIN_TOOLS
    # vLLM truncates unless it is told "disabled" or nothing at all, to a length that depends on max_output_tokens.
    return LocalPrefill.TRUNCATION if body.get("truncation", "disabled") != "disabled" else None


def has_builtin_tools(tools: Any) -> bool:
    """Whether the engine itself would call one of the tools; functions are called by the client."""
    return isinstance(tools, list) and any(
        isinstance(tool, dict) and tool.get("type") not in ("function", "custom") for tool in tools
    )


_CHECKS = {Api.COMPLETIONS: _check_completion, Api.CHAT: _check_chat, Api.RESPONSES: _check_responses}


def _common_local_prefill(body: JsonObject) -> LocalPrefill | None:
    if body.get("prompt_logprobs") is not None:
        return LocalPrefill.PROMPT_LOGPROBS
    if body.get("use_beam_search"):
        return LocalPrefill.BEAM_SEARCH
    if (check_int(body, "best_of", 1) or 1) > 1:
        return LocalPrefill.BEST_OF
    return LocalPrefill.TRUNCATION if body.get("truncate_prompt_tokens") == -1 else None
