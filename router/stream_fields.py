"""Which fields of a request let another engine go on with its stream, and what they are for the rest of it."""

from __future__ import annotations

from typing import Any

from router.types import Api, GenerationRequest, JsonObject, NoContinuation

# What the prompt's ids depend on; that they are the same ones is checked before a stream is continued.
_TEMPLATE = ("messages", "add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs")
_TEMPLATE_MORE = ("tools", "documents", "reasoning_effort")
_PROMPT = ("prompt", "add_special_tokens")
# What only the chat API knows. The values that make a difference to the answer are ruled out one by one.
_CHAT_ONLY = ("max_completion_tokens", "metadata", "store", "service_tier", "tool_choice", "parallel_tool_calls")
_CHAT_ONLY_MORE = ("response_format", "top_logprobs")
_DROPPED = frozenset((*_TEMPLATE, *_TEMPLATE_MORE, *_PROMPT, *_CHAT_ONLY, *_CHAT_ONLY_MORE))

# Fields that mean the same for prompt + tokens so far as for the prompt, and those that are seen to.
_NEUTRAL = _DROPPED | {
    *("model", "stream", "stream_options", "stream_interval", "user", "n", "seed", "max_tokens", "min_tokens"),
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "logit_bias", "allowed_token_ids", "ignore_eos"),
    *("stop", "stop_token_ids", "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens"),
    *("logprobs", "return_token_ids", "priority", "cache_salt", "session_id"),
}
_NEUTRAL_IN_COMPLETIONS = _NEUTRAL | {"return_tokens_as_token_ids", "logprob_token_ids"}


_WHY = {
    NoContinuation.SWITCHED_OFF: "continue_streams is off",
    NoContinuation.API: "streams of the Responses API do not tell the ids of their tokens",
    NoContinuation.SEVERAL_ANSWERS: "it has several answers",
    NoContinuation.SEED: "it samples with a seed, and the random numbers so far are lost",
    NoContinuation.PENALTY: "its presence_penalty or frequency_penalty counts the answer's tokens from its beginning",
    NoContinuation.STRUCTURED_OUTPUT: "its structured output depends on the answer's beginning",
    NoContinuation.TOOLS: "it may call tools, and calls are read from the answer's beginning",
    NoContinuation.MEDIA: "its prompt has more than text",
    NoContinuation.FIELD: "one of its fields may depend on the answer's beginning",
    NoContinuation.REASONING: "it broke before the answer itself had begun",
    NoContinuation.NO_IDS: "the engine told no ids of tokens",
    NoContinuation.PROMPT: "the prompt's tokens could not be had again",
    NoContinuation.TEXT: "it broke where the text of its tokens is not certain",
    NoContinuation.LENGTH: "no token is left to generate",
}


class CantContinue(Exception):
    """Another engine can't go on with a stream."""

    def __init__(self, reason: NoContinuation, field: str = "") -> None:
        """`field` is the name of the one that rules it out: the client's words, which no log gets."""
        super().__init__(_WHY[reason] + (field and f": {field[:50]}"))
        self.reason = reason
        self.logged = _WHY[reason]


def check_fields(request: GenerationRequest) -> None:
    """Raises CantContinue."""
    body, api = request.body, request.api
    if api not in (Api.COMPLETIONS, Api.CHAT):
        raise CantContinue(NoContinuation.API)
    if request.num_choices > 1 or (api is Api.COMPLETIONS and not _is_one(body.get("prompt", ""))):
        raise CantContinue(NoContinuation.SEVERAL_ANSWERS)
    if body.get("seed") is not None and body.get("temperature") != 0:
        raise CantContinue(NoContinuation.SEED)
    if body.get("presence_penalty") or body.get("frequency_penalty"):
        raise CantContinue(NoContinuation.PENALTY)
    if body.get("structured_outputs") or (body.get("response_format") or {"type": "text"}) != {"type": "text"}:
        raise CantContinue(NoContinuation.STRUCTURED_OUTPUT)
    if body.get("tools") and body.get("tool_choice") != "none":
        raise CantContinue(NoContinuation.TOOLS)
    if api is Api.CHAT and not all(map(_is_text, body["messages"])):
        raise CantContinue(NoContinuation.MEDIA)
    neutral = _NEUTRAL if api is Api.CHAT else _NEUTRAL_IN_COMPLETIONS
    for name, value in body.items():
        if value and name not in neutral:
            raise CantContinue(NoContinuation.FIELD, name)


def for_the_rest(request: GenerationRequest) -> JsonObject:
    """The request's fields without its prompt, as the completions API has them."""
    body = request.body
    rest = {name: value for name, value in body.items() if name not in _DROPPED}
    if request.api is Api.CHAT:
        rest.pop("logprobs", None)
        if body.get("logprobs"):
            rest["logprobs"] = body.get("top_logprobs") or 0
    return rest


def stop_strings(body: JsonObject) -> tuple[list[str], bool]:
    """Those of a request, and whether the answer shows the one that it ends with."""
    stop: str | list[str] = body.get("stop") or []
    return [stop] if isinstance(stop, str) else stop, bool(body.get("include_stop_str_in_output"))


def _is_one(prompt: Any) -> bool:
    return not isinstance(prompt, list) or len(prompt) == 1 or type(prompt[0]) is int


def _is_text(message: JsonObject) -> bool:
    content = message.get("content")
    return not isinstance(content, list) or all(isinstance(p, dict) and p.get("type") == "text" for p in content)
