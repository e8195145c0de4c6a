"""The bodies of a request's two legs: the client's, changed as little as vLLM's NIXL pull protocol needs.

The prefill engine computes one token and keeps the KV cache under a lease; the `kv_transfer_params` that it answers
with go to the decode engine, which pulls the cache and ends the lease.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from router.errors import EngineFailure, FailureKind
from router.types import Api

if TYPE_CHECKING:
    from router.types import Endpoint, GenerationRequest, JsonObject

# Meant for the answer, which is the decode leg's. `logprob_token_ids` is refused by vLLM without `logprobs`; and a
# seeded request whose prefill is chunked kills vLLM 0.32.0 on CPU ("CPU Generator does not use offset").
ANSWER_FIELDS = (
    "seed",
    "stream_options",
    "min_tokens",
    "logprobs",
    "top_logprobs",
    "logprob_token_ids",
    "return_token_ids",
    "include",
)

REMOTE_DECODE: JsonObject = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


PULLED_BACK = "tknp_pulled_back"
"""In a prefill engine's answer, if it pulled what it was offered (kv_transfer.scheduler)."""

OFFER_FIELDS = (
    *("remote_engine_id", "remote_request_id", "remote_host", "remote_port", "remote_block_ids", "remote_num_tokens"),
    *("tp_size", "dcp_size", "pp_size", "tknp_offer"),
)
"""Of a kept KV cache: where it is, and what."""


def kept_body(model: str, token_ids: list[int], lease_id: str) -> bytes:
    """A prompt's beginning, which a decode engine has, to be kept for a prefill engine (router.pull_back)."""
    params = {**REMOTE_DECODE, "tknp_lease_id": lease_id}
    body = {"model": model, "prompt": token_ids, "max_tokens": 1, "temperature": 0, "kv_transfer_params": params}
    return orjson.dumps(body)


def prefill_body(
    request: GenerationRequest, lease_id: str, *, is_streamed: bool = False, kept: JsonObject | None = None
) -> bytes:
    """One token, not streamed, with the KV cache kept under a lease of this name; `is_streamed` is about that cache.

    `kept`: what a decode engine keeps of the prompt's beginning.
    """
    body = {name: value for name, value in request.body.items() if name not in ANSWER_FIELDS}
    if request.api is Api.RESPONSES:
        body |= {**_of_response(request), "stream": False, "max_output_tokens": 1}
    else:
        body |= {"stream": False, "max_tokens": 1, "n": 1}
    offered = {name: kept[name] for name in OFFER_FIELDS if name in kept} if kept is not None else {}
    body["kv_transfer_params"] = {**REMOTE_DECODE, **offered, "tknp_lease_id": lease_id}
    if is_streamed:
        body["kv_transfer_params"]["tknp_stream"] = True
    if "max_completion_tokens" in body:
        body["max_completion_tokens"] = 1
    return orjson.dumps(body)


def kv_params(endpoint: Endpoint, reply: bytes) -> JsonObject | None:
    """The `kv_transfer_params` of an engine's answer, None if it kept nothing.

    Raises EngineFailure if the answer is not a JSON object.
    """
    try:
        parsed: Any = orjson.loads(reply)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise EngineFailure(endpoint, FailureKind.GARBAGE, "its answer is not a JSON object")
    params = parsed.get("kv_transfer_params")
    return params if isinstance(params, dict) and params else None


def num_cached(params: JsonObject) -> int | None:
    """Tokens of the prompt that a prefill engine says it had cached; vLLM's decode engines put them into the usage."""
    found = params.get("remote_prefill_cached_tokens")
    return found if isinstance(found, int) else None


def decode_body(request: GenerationRequest, params: JsonObject | None, *, with_ids: bool) -> bytes:
    """The client's body as it is, with where to pull the KV cache from, or without for a local prefill; and asking for
    the ids of the tokens if they are to be noted."""
    body = {**request.body, "return_token_ids": True} if with_ids else request.body
    if request.api is Api.RESPONSES:
        body = {**body, **_of_response(request)}
    if params is not None:
        marked = {**params, "tknp_request_id": request.id, "tknp_num_readers": request.num_choices}
        body = {**body, "kv_transfer_params": marked}
    return orjson.dumps(body)


def _of_response(request: GenerationRequest) -> JsonObject:
    """Of the Responses API vLLM takes the request's id from the body, and an engine that stores never forgets one."""
    return {"request_id": f"resp_{request.id}", "store": False}


def release_body(params: JsonObject) -> bytes:
    """A request that a decode engine refuses at once, and by that tells the prefill engine to free the KV cache.

    vLLM notifies the prefill side of every request with `kv_transfer_params` that its serving layer turns down
    (GenerateBaseServing._with_kv_transfer_rejection_cleanup); an unknown model is the cheapest reason.
    """
    return orjson.dumps({"model": "tknp-release-kv", "prompt": "-", "max_tokens": 1, "kv_transfer_params": params})
