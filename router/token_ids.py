"""Gets the token ids of a prompt from an engine, where engines tell by token ids what they have cached."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import aiohttp
import orjson

from router.types import Role

if TYPE_CHECKING:
    from router.engines import Engine, EnginePool
    from router.types import GenerationRequest, JsonObject

logger = logging.getLogger(__name__)

TIMEOUT = 2.0  # s; a guess is better than a longer wait
# Fields of a request that /tokenize takes too, and that change the tokens.
FIELDS = (
    "model",
    "prompt",
    "messages",
    "tools",
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
        self._failed: set[Engine] = set()  # whose last answer was none, so that it is logged once

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
            demand.token_ids = await self._ask(engine, tokenize_body(request.body))
            demand.num_prompt_tokens, demand.num_prompt_bytes = len(demand.token_ids), 0
            self._failed.discard(engine)
        except (aiohttp.ClientError, OSError, ValueError, TypeError, KeyError) as error:
            if engine not in self._failed:
                logger.warning("%s could not tokenize a prompt, its cache is guessed: %r", engine.endpoint.name, error)
            self._failed.add(engine)

    async def _ask(self, engine: Engine, body: bytes) -> list[int]:
        async with asyncio.timeout(TIMEOUT):
            headers = {"Content-Type": "application/json"}
            async with self._session.post(f"{engine.endpoint.url}/tokenize", data=body, headers=headers) as response:
                raw = await response.read()
        tokens = orjson.loads(raw)["tokens"]
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise ValueError("/tokenize answered without a list of tokens")
        return tokens


def tokenize_body(body: JsonObject) -> bytes:
    fields = {name: body[name] for name in FIELDS if name in body}
    if isinstance(prompt := fields.get("prompt"), list):
        (fields["prompt"],) = prompt  # one text in a list, or it would have no blocks
    return orjson.dumps(fields)
