"""Routes that one engine answers by itself: tokenizing, detokenizing, embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from router.aliases import resolve
from router.errors import EngineRejected, InvalidRequest, UnsupportedModel
from router.fields import refuse
from router.generation import GenerationRoute
from router.types import GenerationRequest, LocalPrefill, Task
from router.validation import parse_json, refuse_router_fields

if TYPE_CHECKING:
    from router.engines import EnginePool
    from router.lifetime import RequestRecord
    from router.reply import Reply
    from router.state import RouterState
    from router.types import JsonObject

# With these an engine says that it has no such route, or not for its model: that it serves the model is known.
NOT_SERVED = (404, 405, 501)

PURPOSES = {Task.TOKENIZE: "tokenize", Task.DETOKENIZE: "detokenize", Task.EMBEDDINGS: "make embeddings"}
ENCODING_FORMATS = ("float", "base64")  # OpenAI's; vLLM has others, whose answers are no JSON


class TaskRoute(GenerationRoute):
    """As a generation's route, with one leg: on a decode engine that serves the model."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._task = task

    def _parse(
        self, state: RouterState, raw: bytes, request_id: str, trace: tuple[tuple[str, str], ...]
    ) -> GenerationRequest:
        body = parse_json(raw)
        refuse_router_fields(body)
        if self._task is Task.EMBEDDINGS:
            encoding = body.get("encoding_format")
            if encoding is not None and encoding not in ENCODING_FORMATS:
                refuse("encoding_format", " or ".join(ENCODING_FORMATS), encoding)
        else:
            _fill_in_model(body, state.pool)
        resolve(body, state.settings.model_aliases)
        model = body.get("model")
        if not isinstance(model, str) or not model:
            refuse("model", "the name of a model", model)
        return GenerationRequest(request_id, self._task, body, model, False, 1, LocalPrefill.TASK, trace)

    async def _serve(self, state: RouterState, request: GenerationRequest, record: RequestRecord, reply: Reply) -> None:
        try:
            await super()._serve(state, request, record, reply)
        except EngineRejected as error:
            if error.status not in NOT_SERVED:
                raise
            raise UnsupportedModel(
                f"The model {request.model!r} can't {PURPOSES[self._task]}: the engine that serves it has no "
                f"{self._task}. Use another model; GET /v1/models lists them.",
                param="model",
            ) from error


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
