"""GET /openapi.json: FastAPI describes its own routes, this module the plain ASGI ones.

A request's schema holds what the router checks and no more: every other field of OpenAI's or vLLM's passes to the
engine. tests/router/test_openapi.py holds both against each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict

from router.errors import MethodNotAllowed, RouterError
from router.fields import INT64
from router.tasks import ENCODING_FORMATS
from router.types import Api, Task
from router.validation import MAX_NUM_CHOICES, ROUTER_FIELDS
from tknp import __version__

if TYPE_CHECKING:
    from fastapi import FastAPI

Schema = dict[str, Any]


STORED_RESPONSES = {
    "/v1/responses/{response_id}": ("GET", "DELETE"),
    "/v1/responses/{response_id}/cancel": ("POST",),
    "/v1/responses/{response_id}/input_items": ("GET",),
}


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | int | None


class ErrorBody(BaseModel):
    """OpenAI's error body, of every status but 200."""

    error: Error


class Model(BaseModel):
    """An engine's model card; an alias has the model's name in `root`."""

    model_config = ConfigDict(extra="allow")
    id: str


class ModelList(BaseModel):
    object: str
    data: list[Model]


class Health(BaseModel):
    status: str


class Target(BaseModel):
    """What Prometheus scrapes."""

    targets: list[str]
    labels: dict[str, str]


class EngineStatus(BaseModel):
    """One engine as this router sees it."""

    role: str
    url: str
    up: bool
    draining: bool
    failing: bool
    reason: str | None
    models: list[str]
    outstanding_requests: int


class Readiness(BaseModel):
    ready: bool
    missing: list[str]
    engines: list[EngineStatus]


class RequestMoments(BaseModel):
    """The moments of one request in unix seconds, its phases in seconds, and its legs."""

    model_config = ConfigDict(extra="allow")
    request_id: str
    moments: dict[str, float]


def describe(app: FastAPI) -> Schema:
    """The whole document; made once, because routes do not change while the application runs."""
    if app.openapi_schema is None:
        document = get_openapi(title="tknp router", version=__version__, routes=app.routes)
        for operations in document["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)  # FastAPI's own; a path's text is never invalid
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        error_schema = ErrorBody.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(error_schema.pop("$defs"), ErrorBody=error_schema)
        document["paths"] |= {api.value: {"post": _generation(api)} for api in Api}
        document["paths"] |= {task.value: {"post": _task(task)} for task in Task}
        document["paths"] |= {
            path: {method.lower(): _stored(path, method.lower()) for method in methods}
            for path, methods in STORED_RESPONSES.items()
        }
        app.openapi_schema = document
    return app.openapi_schema


def errors(*statuses: int) -> dict[int | str, Schema]:
    """Responses with OpenAI's error body: these, and those that every route has."""
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in (*statuses, 431, 500)}


def _engine_errors() -> dict[str, Schema]:
    """What the router answers with by itself where a body goes to an engine, and what it passes on from there."""
    kinds = {kind.status for kind in _error_kinds(RouterError) if kind is not MethodNotAllowed}
    found = errors(*(kinds | {422, 502, 504}))
    return {str(status): found[status] for status in sorted(map(int, found))}


def _error_kinds(base: type[RouterError]) -> Iterator[type[RouterError]]:
    yield base
    for kind in base.__subclasses__():
        yield from _error_kinds(kind)


def _operation(path: str, summary: str, body: Schema, answers: Schema) -> Schema:
    return {
        "summary": summary,
        "operationId": path.strip("/").replace("/", "_"),
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {
            "200": {"description": "The answer", "content": answers},
            **_engine_errors(),
        },
    }


def _generation(api: Api) -> Schema:
    summary, body = {
        Api.COMPLETIONS: ("Continue a prompt", _completion()),
        Api.CHAT: ("Answer a conversation", _chat()),
        Api.RESPONSES: ("Answer an input (OpenAI's Responses API); nothing is stored", _response()),
    }[api]
    answers = {
        "application/json": {"schema": {"type": "object", "description": "The decode engine's answer, as it is"}},
        "text/event-stream": {"schema": _EVENT},
    }
    return _operation(api, summary, body, answers)


def _task(task: Task) -> Schema:
    summary = {
        Task.TOKENIZE: "The tokens of a prompt or of a conversation",
        Task.DETOKENIZE: "The text of tokens",
        Task.EMBEDDINGS: "Embeddings, of models that make them",
    }[task]
    properties = {**_reserved(), "model": _MODEL, "encoding_format": {"enum": [*ENCODING_FORMATS, None]}}
    body: Schema = {"type": "object", "properties": properties, "required": ["model"]}
    if task is not Task.EMBEDDINGS:  # with one model served it may be left out
        body = {"type": "object", "properties": {**_reserved(), "model": _nullable(_MODEL)}}
    return _operation(task, summary, body, {"application/json": {"schema": {"type": "object"}}})


def _stored(path: str, method: str) -> Schema:
    return {
        "summary": "Always 404: responses are not stored here",
        "operationId": f"{method}_{path.strip('/').replace('/', '_').replace('{', '').replace('}', '')}",
        "parameters": [{"name": "response_id", "in": "path", "required": True, "schema": {"type": "string"}}],
        "responses": {str(status): response for status, response in errors(404).items()},
    }


def _nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _integer(low: int, high: int = INT64 - 1) -> Schema:
    return _nullable({"type": "integer", "minimum": low, "maximum": high})


def _number(low: float, high: float) -> Schema:
    return _nullable({"type": "number", "minimum": low, "maximum": high})


_EVENT = {
    "description": "Server-sent events, if stream is true; this is one of them",
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
_BOOL = _nullable({"type": "boolean"})
_TEXT = {"type": "string", "minLength": 1}
_TEXTS = {"type": "array", "items": _TEXT, "minItems": 1}
_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": INT64 - 1}, "minItems": 1}
_PROMPT = {"anyOf": [_TEXT, _TOKENS, _TEXTS, {"type": "array", "items": _TOKENS, "minItems": 1}]}
_MODEL = {**_TEXT, "description": "A model that GET /v1/models lists"}
_MESSAGE = {"type": "object", "properties": {"role": {"type": "string"}}, "required": ["role"]}


def _reserved() -> Schema:
    """Fields that only the router may set; it refuses them with a 400."""
    return dict.fromkeys(ROUTER_FIELDS, False)


def _sampling() -> Schema:
    """What the ways to generate have in common."""
    return {
        **_reserved(),
        "model": _MODEL,
        "stream": _BOOL,
        "temperature": _number(0, 2),
        "top_p": _nullable({"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
        "presence_penalty": _number(-2, 2),
        "frequency_penalty": _number(-2, 2),
        "seed": _integer(-INT64),
        "stop": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}, {"type": "null"}]},
        "min_tokens": _integer(0),
        "best_of": _integer(1),
        "prompt_logprobs": _integer(-1),
        "truncate_prompt_tokens": _integer(-1),
        "stream_options": {"anyOf": [{"type": "object"}, {"type": "null"}], "description": "Needs stream=true."},
    }


# `stream_options` is for streams alone.
_STREAM_RULE: Schema = {
    "if": {"properties": {"stream": {"const": True}}, "required": ["stream"]},
    "else": {"properties": {"stream_options": {"type": "null"}}},
}


def _completion() -> Schema:
    properties = _sampling() | {
        "n": _integer(1, MAX_NUM_CHOICES),
        "prompt": _nullable(_PROMPT),
        "prompt_embeds": {"description": "Embeddings in place of a prompt; passed on as they are"},
        "echo": _BOOL,
        "logprobs": _integer(-1),
        "max_tokens": {**_integer(0), "description": "0 with echo=true only"},
    }
    needs_prompt = {"properties": {"prompt": _PROMPT}, "required": ["prompt"]}
    needs_embeds = {"properties": {"prompt_embeds": {"not": {"type": "null"}}}, "required": ["prompt_embeds"]}
    echo_rule = {
        "if": {"properties": {"echo": {"const": True}}, "required": ["echo"]},
        "else": {"properties": {"max_tokens": _integer(1)}},
    }
    return {
        "type": "object",
        "properties": properties,
        "required": ["model"],
        "anyOf": [needs_prompt, needs_embeds],
        "allOf": [_STREAM_RULE, echo_rule],
    }


def _chat() -> Schema:
    properties = _sampling() | {
        "n": _integer(1, MAX_NUM_CHOICES),
        "messages": {"type": "array", "items": _MESSAGE, "minItems": 1},
        "max_tokens": {**_integer(1), "deprecated": True},
        "max_completion_tokens": _integer(1),
        "logprobs": _BOOL,
        "top_logprobs": _integer(-1),
    }
    return {"type": "object", "properties": properties, "required": ["model", "messages"], "allOf": [_STREAM_RULE]}


def _response() -> Schema:
    items = {"type": "array", "items": {"type": "object"}, "minItems": 1}
    nothing = {"type": "null", "description": "Refused: responses are not stored here"}
    properties = _sampling() | {
        "input": {"anyOf": [{"type": "string"}, items]},
        "max_output_tokens": _integer(1),
        "top_logprobs": _integer(0, 20),
        "store": {**_BOOL, "description": "Taken and ignored: nothing is stored here"},
        "background": {"enum": [None, False], "description": "Refused: responses are not stored here"},
        "previous_response_id": nothing,
        "conversation": nothing,
    }
    return {"type": "object", "properties": properties, "required": ["model", "input"], "allOf": [_STREAM_RULE]}
