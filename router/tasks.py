"""Routes that one engine answers by itself: tokenizing, detokenizing, embeddings."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import orjson

from router.aliases import resolve
from router.errors import EngineFailure, EngineRejected, InvalidRequest, UnsupportedModel
from router.fields import refuse
from router.generation import GenerationRoute, read_request
from router.types import GenerationRequest, Role, Task
from router.upstream import engine_failures, post
from router.validation import parse_json, refuse_router_fields

if TYPE_CHECKING:
    from starlette.types import Receive, Scope

    from router.engines import Engine, EnginePool
    from router.lifetime import RequestRecord
    from router.reply import Reply
    from router.state import RouterState
    from router.types import JsonObject

# With these an engine says that it has no such route, or not for its model: that it serves the model is known.
NOT_SERVED = (404, 405, 501)

PURPOSES = {Task.TOKENIZE: "tokenize", Task.DETOKENIZE: "detokenize", Task.EMBEDDINGS: "make embeddings"}


class TaskRoute(GenerationRoute):
    """As a generation's route, with one leg on whichever decode engine serves the model, and no KV cache."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._task = task

    async def _accept(
        self, state: RouterState, record: RequestRecord, scope: Scope, receive: Receive
    ) -> GenerationRequest:
        raw, trace = await read_request(state.settings, scope, receive)
        body = parse_json(raw)
        refuse_router_fields(body)
        if self._task is not Task.EMBEDDINGS:
            _fill_in_model(body, state.pool)
        resolve(body, state.settings.model_aliases)
        model = body.get("model")
        if not isinstance(model, str) or not model:
            refuse("model", "the name of a model", model)
        record.model = model
        state.pool.require(model, (Role.DECODE,))
        return GenerationRequest(record.id, self._task, body, model, False, 1, None, trace)

    async def _serve(self, state: RouterState, request: GenerationRequest, record: RequestRecord, reply: Reply) -> None:
        """Asks one engine after the other, the least busy first, until one answers."""
        engines = sorted(state.pool.alive(Role.DECODE, request.model), key=lambda engine: engine.num_outstanding)
        engines = engines[: 1 + state.settings.num_retries]
        for num_left, engine in zip(reversed(range(len(engines))), engines, strict=True):
            try:
                body, content_type = await self._ask(state, engine, request)
            except EngineFailure as failure:
                engine.suspect(failure)
                if not num_left:
                    raise
                state.metrics.retried(Role.DECODE)
            except EngineRejected as error:
                if error.status not in NOT_SERVED:
                    raise
                raise self._unsupported(request.model) from error
            else:
                await reply.whole(200, body, [], content_type)
                return
        state.pool.require(request.model, (Role.DECODE,))  # the last engine went since the request was accepted
        raise self._unsupported(request.model)

    async def _ask(self, state: RouterState, engine: Engine, request: GenerationRequest) -> tuple[bytes, bytes]:
        """The body of the engine's 200, and its content type."""
        with engine.occupied(), engine_failures(engine.endpoint):
            async with asyncio.timeout(state.settings.prefill_timeout):
                async with await post(
                    state.fleet.session, engine.endpoint, request, orjson.dumps(request.body)
                ) as response:
                    return await response.read(), response.headers["Content-Type"].encode("latin-1")

    def _unsupported(self, model: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"The model {model!r} can't {PURPOSES[self._task]}: no engine that serves it has {self._task}. "
            "Use another model; GET /v1/models lists them.",
            param="model",
        )


def _fill_in_model(body: JsonObject, pool: EnginePool) -> None:
    """vLLM lets a tokenizer's client leave the model out. With several models that would be a guess."""
    if body.get("model") is not None:
        return
    models = pool.models()
    if len(models) > 1:
        raise InvalidRequest(
            f"model is missing and {len(models)} models are served: name one of {', '.join(sorted(models))}.",
            param="model",
        )
    body["model"] = next(iter(models), None)
