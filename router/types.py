"""The words that every module of the router speaks."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

from router.demand import Demand

JsonObject = dict[str, Any]


class Role(StrEnum):
    """What an engine is for."""

    PREFILL = "prefill"
    DECODE = "decode"

    @property
    def other(self) -> Role:
        return Role.DECODE if self is Role.PREFILL else Role.PREFILL


class Api(StrEnum):
    """The ways to ask for tokens; the value is the path, the same on the router and on every engine."""

    COMPLETIONS = "/v1/completions"
    CHAT = "/v1/chat/completions"
    RESPONSES = "/v1/responses"


class Task(StrEnum):
    """What one engine answers by itself, without generating anything; the value is the path here and there."""

    TOKENIZE = "/tokenize"
    DETOKENIZE = "/detokenize"
    EMBEDDINGS = "/v1/embeddings"


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
    BUILTIN_TOOLS = "builtin_tools"  # the engine runs them between several generations; one hand-off serves one
    TASK = "task"  # tokenizing or embeddings: nothing is decoded
    NO_KV = "no_kv"  # the prefill engine answered without kv_transfer_params
    SHORT_PROMPT = "short_prompt"  # at most local_prefill_tokens long
    CACHED_PROMPT = "cached_prompt"  # all but local_prefill_tokens of it is cached on a decode engine
    NO_PREFILL_ENGINE = "no_prefill_engine"  # none is alive for the model, and decode_only is on
    PREFILL_FAILED = "prefill_failed"  # on every engine that could be tried, and decode_only is on


class Outcome(StrEnum):
    """How a request, or one leg of it, ended. The values are labels of metrics."""

    OK = "ok"
    INVALID = "invalid"  # refused by the router: nothing reached an engine
    REJECTED = "rejected"  # refused by an engine with a 4xx
    UNAVAILABLE = "unavailable"  # no engine alive for it
    OVERLOADED = "overloaded"  # no room for it in the router
    FAILED = "failed"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"  # the client hung up


class Rejection(StrEnum):
    """Why admission turned a request away. The values are labels of a metric."""

    KEY_LIMIT = "key_limit"  # its API key has as many requests here as it may
    QUEUE_FULL = "queue_full"
    DISPLACED = "displaced"  # it waited, and made room for a request of a higher priority or of a key with fewer
    QUEUE_TIMEOUT = "queue_timeout"
    DEADLINE = "deadline"  # its own deadline passed while it waited, or would have


class NoContinuation(StrEnum):
    """Why no other engine could go on with a stream whose engine died. The values are labels of a metric."""

    SWITCHED_OFF = "switched_off"
    API = "api"  # the Responses API: its events do not tell the ids of tokens
    SEVERAL_ANSWERS = "several_answers"
    SEED = "seed"  # the generator's state died with the engine
    PENALTY = "penalty"  # presence and frequency penalties tell the answer's tokens from the prompt's
    STRUCTURED_OUTPUT = "structured_output"  # the grammar's state
    TOOLS = "tools"  # the tool parser's state
    MEDIA = "media"  # the prompt is more than its tokens
    FIELD = "field"  # one that is not known to mean the same for prompt + tokens so far
    REASONING = "reasoning"  # a reasoning parser's state; or the stream has no text yet that could tell
    NO_IDS = "no_ids"  # the engine told no ids of tokens
    PROMPT = "prompt"  # its ids could not be had, or are not those that the first engine told
    TEXT = "text"  # the tokens' text is not known to the character
    LENGTH = "length"  # no token is left to generate, but the engine had not said so


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
    api: Api | Task
    body: JsonObject
    model: str
    stream: bool
    num_choices: int
    local_prefill: LocalPrefill | None
    trace_headers: tuple[tuple[str, str], ...] = ()
    demand: Demand = field(default_factory=Demand)  # filled in once it is known who serves the model
