"""The words that every module of the router speaks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

JsonObject = dict[str, Any]


class Role(StrEnum):
    """What an engine is for."""

    PREFILL = "prefill"
    DECODE = "decode"


class Api(StrEnum):
    """The two ways to ask for tokens; the value is the path, the same on the router and on every engine."""

    COMPLETIONS = "/v1/completions"
    CHAT = "/v1/chat/completions"


class LocalPrefill(StrEnum):
    """Why a request goes to a decode engine without a prefill leg. The values are labels of a metric."""

    SEVERAL_PROMPTS = "several_prompts"  # one hand-off carries the KV cache of one prompt
    PROMPT_EMBEDS = "prompt_embeds"
    PROMPT_LOGPROBS = "prompt_logprobs"  # the engine that answers must have computed the prompt itself
    ECHO_LOGPROBS = "echo_logprobs"
    NO_GENERATION = "no_generation"  # max_tokens=0: there is nothing to decode
    BEAM_SEARCH = "beam_search"
    BEST_OF = "best_of"
    TRUNCATION = "truncation"  # truncate_prompt_tokens=-1 depends on max_tokens, which the prefill leg changes
    NO_KV = "no_kv"  # the prefill engine answered without kv_transfer_params


class Outcome(StrEnum):
    """How a request, or one leg of it, ended. The values are labels of metrics."""

    OK = "ok"
    INVALID = "invalid"  # refused by the router: nothing reached an engine
    REJECTED = "rejected"  # refused by an engine with a 4xx
    UNAVAILABLE = "unavailable"  # no engine alive for it
    FAILED = "failed"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"  # the client hung up


class LeaseEnd(StrEnum):
    """What became of KV cache that was kept in vain. The values are labels of a metric."""

    RELEASED = "released"
    EXPIRES = "expires"  # nobody could be told: it is held until vLLM's lease ends


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an engine listens."""

    role: Role
    url: str  # scheme://host:port, no path

    @property
    def name(self) -> str:
        """host:port: what logs and labels say."""
        return urlsplit(self.url).netloc


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A client's request after validation; `body` is what the client sent, parsed."""

    id: str
    api: Api
    body: JsonObject
    model: str
    stream: bool
    num_choices: int
    local_prefill: LocalPrefill | None
    trace_headers: tuple[tuple[str, str], ...] = ()
