"""A proxy in front of one engine, as people write it: FastAPI, one shared httpx client, StreamingResponse.

    python fastapi_httpx.py PORT ENGINE_URL

It is a fair one: the client is shared and without a limit on connections, nothing is logged, uvicorn has uvloop and
httptools, and an answer that is not streamed is passed on with its status.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse


def create_app(engine_url: str) -> FastAPI:
    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=engine_url, timeout=None, limits=limits) as client:
            app.state.client = client
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/v1/completions")
    @app.post("/v1/chat/completions")
    async def forward(request: Request) -> Response:
        client: httpx.AsyncClient = request.app.state.client
        body = await request.json()
        sent = client.build_request("POST", request.url.path, json=body)
        response = await client.send(sent, stream=True)
        if not body.get("stream"):
            content = await response.aread()
            await response.aclose()
            return Response(content, response.status_code, media_type=response.headers["content-type"])

        async def relay() -> AsyncIterator[bytes]:
            try:
                async for chunk in response.aiter_raw():
                    yield chunk
            finally:
                await response.aclose()

        return StreamingResponse(relay(), response.status_code, media_type="text/event-stream")

    return app


if __name__ == "__main__":
    port, url = sys.argv[1:]
    uvicorn.run(
        create_app(url),
        host="127.0.0.1",
        port=int(port),
        loop="uvloop",
        http="httptools",
        access_log=False,
        backlog=4096,
    )
