"""The application: routes, and the server that runs them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import sys
from collections.abc import AsyncIterator
from functools import partial
from http import HTTPStatus
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client.exposition import choose_encoder
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from router.aliases import with_aliases
from router.drain import DrainingServer, drain_engine, resume_engine
from router.errors import InvalidRequest, MethodNotAllowed, ModelNotFound, NotFound, RouterError, error_body
from router.front import Front
from router.gate import PROBES, Gate, caller_of
from router.generation import GenerationRoute
from router.hot import HotPaths
from router.live import live_page, status
from router.logs import configure_logging
from router.openapi import (
    STORED_RESPONSES,
    Health,
    Model,
    ModelList,
    Readiness,
    RequestMoments,
    Target,
    describe,
    errors,
)
from router.protocol import limited_protocol
from router.settings import RouterSettings
from router.state import RouterState, open_state
from router.targets import metric_targets
from router.tasks import TaskRoute
from router.tls import Certificate
from router.types import Api, JsonObject, Task


class RouterApp(FastAPI):
    """A FastAPI application that can have something in front of its whole middleware stack."""

    way_in: ASGIApp

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.way_in = super().__call__

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self
        await self.way_in(scope, receive, send)


def create_app(settings: RouterSettings, certificate: Certificate | None = None) -> RouterApp:
    """All state is built when the application starts, in its lifespan, and hangs on `app.state.router`."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        fresh = contextlib.nullcontext() if certificate is None else certificate.kept_fresh()
        async with fresh, open_state(settings) as state:
            app.state.router = state
            yield

    app = RouterApp(title="tknp router", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Gate, open_paths=PROBES | ({"/metrics", "/metrics/targets"} if settings.open_metrics else set()))
    app.add_middleware(Front, max_header_bytes=settings.max_header_bytes)
    hot: dict[str, ASGIApp] = {api: GenerationRoute(api) for api in Api} | {task: TaskRoute(task) for task in Task}
    for path, route in hot.items():
        app.router.routes.append(Route(path, route, methods=["POST"]))  # for the other methods' 405, and the schema
    app.way_in = HotPaths(hot, settings.max_header_bytes, app.way_in)
    if settings.cors_allowed_origins:  # outermost: a browser asks without a key first, and reads errors too
        app.way_in = CORSMiddleware(
            app.way_in,
            allow_origins=settings.cors_allowed_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("X-Request-Id", "Retry-After"),
        )
    add_api_routes(app)
    app.openapi = partial(describe, app)  # type: ignore[method-assign]
    app.add_exception_handler(RouterError, answer_router_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.add_exception_handler(Exception, answer_unexpected)
    return app


def add_api_routes(app: FastAPI) -> None:
    """Everything that is not hot. The models are for the schema: what is answered is not checked again."""
    for path, methods in STORED_RESPONSES.items():
        app.router.routes.append(Route(path, stored_response, methods=list(methods)))
    app.add_api_route("/", live_page(), response_class=HTMLResponse, responses=errors())
    app.add_api_route("/status", status, responses=errors(403))
    app.add_api_route("/v1/models", list_models, responses={**errors(), 200: {"model": ModelList}})
    app.add_api_route("/v1/models/{model:path}", retrieve_model, responses={**errors(404), 200: {"model": Model}})
    app.add_api_route("/health", health, responses={**errors(), 200: {"model": Health}})
    app.add_api_route("/ready", ready, responses={**errors(), 200: {"model": Readiness}, 503: {"model": Readiness}})
    app.add_api_route("/metrics", metrics, responses=errors(), response_class=PlainTextResponse)
    app.add_api_route("/metrics/targets", metric_targets, responses={**errors(), 200: {"model": list[Target]}})
    app.add_api_route("/admin/engines/{name}/drain", drain_engine, methods=["POST"], responses=errors(404))
    app.add_api_route("/admin/engines/{name}/resume", resume_engine, methods=["POST"], responses=errors(404))
    record: dict[int | str, Any] = {**errors(404), 200: {"model": RequestMoments}}
    app.add_api_route("/requests/{request_id:path}", request_record, responses=record)


def make_server(settings: RouterSettings) -> uvicorn.Server:
    """The server, not started: `await server.serve()` or `server.run()`."""
    certificate = None
    if settings.ssl_certfile is not None:
        certificate = Certificate(settings.ssl_certfile, settings.ssl_keyfile, settings.ssl_ca_certs)
    config = uvicorn.Config(
        create_app(settings, certificate),
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=limited_protocol(settings),
        ssl_context_factory=None if certificate is None else lambda config, default: certificate.context,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing here looks at the client's address
        timeout_keep_alive=75,  # longer than load balancers keep theirs (60 s), so that no request meets a closing door
        timeout_graceful_shutdown=max(1, int(settings.shutdown_timeout)),
    )
    return DrainingServer(config, settings.drain_seconds)


def run(settings: RouterSettings) -> None:
    """Serves until SIGTERM or SIGINT. Exits with status 3, as uvicorn does, if it can't start."""
    configure_logging()
    raise_open_files_limit()
    # A full collection walks the objects of every stream: with 2,000 of them it held all up for 130 to 300 ms.
    gc.set_threshold(20_000, 50, 1000)
    server = make_server(settings)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it once more after it has shut down
        server.run()
    if not server.started:
        sys.exit(3)


def raise_open_files_limit() -> None:
    """A stream takes two descriptors, and the usual soft limit is 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def list_models(request: Request) -> JSONResponse:
    """What the decode engines alive serve, as of their last check, and its aliases."""
    return JSONResponse({"object": "list", "data": list(_models(request).values())})


async def retrieve_model(model: str, request: Request) -> JSONResponse:
    """One of them."""
    models = _models(request)
    if model not in models:
        served = f"use one of: {', '.join(sorted(models))}" if models else "no engine is up that serves any"
        raise ModelNotFound(f"The model {model!r} is not served here; {served}.", param="model")
    return JSONResponse(models[model])


async def stored_response(request: Request) -> Response:
    """Responses are not stored: a later request may meet another engine, or another router."""
    raise NotFound(
        f"No response {request.path_params['response_id']!r} is stored: none are stored here. "
        f"Keep the answer to POST {Api.RESPONSES}, and send the earlier items of a conversation in input."
    )


async def health() -> dict[str, str]:
    """This process is alive; says nothing about engines."""
    return {"status": "ok"}


async def ready(request: Request) -> JSONResponse:
    """Whether a request would be served now, and if not, what is missing; to strangers, no more than whether."""
    state = _state(request)
    pool = state.pool
    missing = ["the router is draining"] if state.is_draining else pool.missing()
    status = HTTPStatus.SERVICE_UNAVAILABLE if missing else HTTPStatus.OK
    if not state.access.is_known(request.scope):
        return JSONResponse({"ready": not missing}, status)
    engines = [
        {
            "role": engine.endpoint.role,
            "url": engine.endpoint.url,
            "up": engine.is_up,
            "draining": engine.is_draining,
            "failing": engine.breaker.is_open,
            "reason": engine.down_reason or None,
            "models": list(engine.models),
            "outstanding_requests": engine.num_outstanding,
            "outstanding_tokens": engine.load.num_tokens,
            **engine.load.kv.as_dict(engine.endpoint.role),
        }
        for engine in pool.engines
    ]
    content = {"ready": not missing, "missing": missing, "degraded": pool.degraded(), "engines": engines}
    return JSONResponse(content, status)


async def metrics(request: Request) -> Response:
    """Prometheus text. Rendered on a thread: hundreds of label sets take milliseconds that streams would wait for."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    content = await asyncio.to_thread(encode, _state(request).registry)
    return Response(content, media_type=content_type)


async def request_record(request_id: str, request: Request) -> JSONResponse:
    """The moments of one request, in flight or among the last that ended."""
    record = _state(request).records.get(request_id)
    if record is None or not record.is_visible_to(caller_of(request)):  # others' requests do not exist for a caller
        raise NotFound(f"No request {request_id!r} is in flight or among the last that were kept.")
    return JSONResponse(record.as_dict())


def _models(request: Request) -> dict[str, JsonObject]:
    state = _state(request)
    return with_aliases(state.pool.models(), state.settings.model_aliases)


def _state(request: Request) -> RouterState:
    state: RouterState = request.app.state.router
    return state


def answer(error: RouterError) -> Response:
    response = Response(error_body(error), error.status, media_type="application/json")
    response.raw_headers.extend(error.headers)
    return response


async def answer_router_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RouterError)
    return answer(error)


async def answer_http_error(request: Request, error: Exception) -> Response:
    """FastAPI's own: an unknown path or a wrong method."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    if error.status_code == HTTPStatus.NOT_FOUND:
        return answer(NotFound(f"Unknown path: {where}."))
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        response = answer(MethodNotAllowed(f"Wrong method: {where}."))
        response.headers.update(error.headers or {})
        return response
    return answer(InvalidRequest(str(error.detail)))


async def answer_unexpected(request: Request, error: Exception) -> Response:
    response = answer(RouterError("The router failed. Its log says why."))
    response.headers["x-request-id"] = request.state.request_id  # Front is not in the way of this answer
    return response
