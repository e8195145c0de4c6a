"""Gets the token ids of a prompt from an engine, where engines tell by token ids what they have cached."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING
from weakref import WeakSet

import orjson

from router.errors import EngineFailure, FailureKind
from router.prompt import prompt_fields
from router.types import Role, Task
from router.upstream import EngineFailures

if TYPE_CHECKING:
    import aiohttp

    from router.engines import Engine, EnginePool
    from router.types import Endpoint, GenerationRequest

logger = logging.getLogger(__name__)

TIMEOUT = 2.0  # s; a guess is better than a longer wait
# Fields beside the prompt that /tokenize takes too, and that change the tokens.
FIELDS = (
    "model",
    "add_special_tokens",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "chat_template_kwargs",
)


class PromptTokenizer:
    def __init__(self, pool: EnginePool, session: aiohttp.ClientSession) -> None:
        self._pool = pool
        self._session = session
        self._failed: WeakSet[Engine] = WeakSet()  # whose last answer was none, so that it is logged once

    async def complete(self, request: GenerationRequest) -> None:
        """Fills in `demand.token_ids` of a request whose prompt has blocks worth looking up, if an engine wants them.

        One request to an engine, and only where KV events arrive; without an answer the prefixes are guessed.
        """
        demand = request.demand
        if demand.token_ids is not None or not demand.prefix or not demand.is_plain:
            return
        engines = [engine for role in Role for engine in self._pool.alive(role, request.model)]
        if not any(engine.load.events is not None for engine in engines):
            return
        engine = min(engines, key=lambda engine: engine.num_outstanding)
        try:
            demand.token_ids = await fetch_token_ids(self._session, engine.endpoint, request, TIMEOUT)
            demand.num_prompt_tokens, demand.num_prompt_bytes = len(demand.token_ids), 0
            self._failed.discard(engine)
        except EngineFailure as error:
            if engine not in self._failed:
                logger.warning("%s could not tokenize a prompt, its cache is guessed: %s", engine.endpoint.name, error)
            self._failed.add(engine)


async def fetch_token_ids(
    session: aiohttp.ClientSession, endpoint: Endpoint, request: GenerationRequest, seconds: float
) -> list[int]:
    """The request's prompt in tokens, as the engine sees it. Raises EngineFailure."""
    raw = await _ask(session, endpoint, Task.TOKENIZE, tokenize_body(request), seconds)
    try:
        tokens = orjson.loads(raw)["tokens"]
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise ValueError("not a list of tokens")
    except (ValueError, TypeError, KeyError) as error:
        raise EngineFailure(endpoint, FailureKind.GARBAGE, f"{Task.TOKENIZE} answered with no tokens") from error
    return tokens


async def fetch_text(
    session: aiohttp.ClientSession, endpoint: Endpoint, model: str, tokens: list[int], seconds: float
) -> str:
    """The text of some tokens, special ones too. Raises EngineFailure."""
    raw = await _ask(session, endpoint, Task.DETOKENIZE, orjson.dumps({"model": model, "tokens": tokens}), seconds)
    try:
        text = orjson.loads(raw)["prompt"]
        if not isinstance(text, str):
            raise ValueError("not a text")
    except (ValueError, TypeError, KeyError) as error:
        raise EngineFailure(endpoint, FailureKind.GARBAGE, f"{Task.DETOKENIZE} answered with no text") from error
    return text


async def _ask(session: aiohttp.ClientSession, endpoint: Endpoint, task: Task, body: bytes, seconds: float) -> bytes:
    headers = {"Content-Type": "application/json"}
    with EngineFailures(endpoint):
        async with asyncio.timeout(seconds):
            async with session.post(
                f"{endpoint.url}{task}", data=body, headers=headers, allow_redirects=False
            ) as response:
                return await response.read()


def tokenize_body(request: GenerationRequest) -> bytes:
    """The prompt and what shapes it; a field of another API is left out, for the engine would look at it."""
    prompt = prompt_fields(request.api, request.body)
    fields = {name: prompt[name] for name in ("prompt", "messages", "tools") if name in prompt}
    if isinstance(texts := fields.get("prompt"), list):
        (fields["prompt"],) = texts  # one text in a list, or it would have no blocks
    return orjson.dumps({**fields, **{name: request.body[name] for name in FIELDS if name in request.body}})
