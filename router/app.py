"""The application: routes, and the server that runs them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import sys
from collections.abc import AsyncIterator
from http import HTTPStatus

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client.exposition import choose_encoder
from starlette.exceptions import HTTPException
from starlette.routing import Route

from router.drain import DrainingServer, drain_engine, resume_engine
from router.errors import InvalidRequest, MethodNotAllowed, NotFound, RouterError, error_body
from router.front import Front
from router.generation import GenerationRoute
from router.logs import configure_logging
from router.protocol import limited_protocol
from router.settings import RouterSettings
from router.state import RouterState, open_state
from router.types import Api


def create_app(settings: RouterSettings) -> FastAPI:
    """All state is built when the application starts, in its lifespan, and hangs on `app.state.router`."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_state(settings) as state:
            app.state.router = state
            yield

    app = FastAPI(title="tknp router", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Front, max_header_bytes=settings.max_header_bytes)
    for api in Api:
        app.router.routes.append(Route(api, GenerationRoute(api), methods=["POST"]))
    app.add_api_route("/v1/models", list_models)
    app.add_api_route("/health", health)
    app.add_api_route("/ready", ready)
    app.add_api_route("/metrics", metrics)
    app.add_api_route("/admin/engines/{name}/drain", drain_engine, methods=["POST"])
    app.add_api_route("/admin/engines/{name}/resume", resume_engine, methods=["POST"])
    app.add_api_route("/requests/{request_id:path}", request_record)
    app.add_exception_handler(RouterError, answer_router_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.add_exception_handler(Exception, answer_unexpected)
    return app


def make_server(settings: RouterSettings) -> uvicorn.Server:
    """The server, not started: `await server.serve()` or `server.run()`."""
    config = uvicorn.Config(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=limited_protocol(settings.max_header_bytes),
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
    gc.set_threshold(100_000, 50, 1000)
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
    """What the decode engines alive serve, as of their last check."""
    return JSONResponse({"object": "list", "data": list(_state(request).pool.models().values())})


async def health() -> dict[str, str]:
    """This process is alive; says nothing about engines."""
    return {"status": "ok"}


async def ready(request: Request) -> JSONResponse:
    """Whether a request would be served now, and if not, what is missing."""
    state = _state(request)
    pool = state.pool
    missing = ["the router is draining"] if state.is_draining else pool.missing()
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
        }
        for engine in pool.engines
    ]
    content = {"ready": not missing, "missing": missing, "engines": engines}
    return JSONResponse(content, HTTPStatus.SERVICE_UNAVAILABLE if missing else HTTPStatus.OK)


async def metrics(request: Request) -> Response:
    """Prometheus text. Rendered on a thread: hundreds of label sets take milliseconds that streams would wait for."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    content = await asyncio.to_thread(encode, _state(request).registry)
    return Response(content, media_type=content_type)


async def request_record(request_id: str, request: Request) -> JSONResponse:
    """The moments of one request, in flight or among the last that ended."""
    record = _state(request).records.get(request_id)
    if record is None:
        raise NotFound(f"No request {request_id!r} is in flight or among the last that were kept.")
    return JSONResponse(record.as_dict())


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
    return answer(RouterError("The router failed. Its log says why."))
