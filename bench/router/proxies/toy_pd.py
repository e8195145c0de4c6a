"""A prefill/decode proxy with the structure of vLLM's toy_proxy_server.py, written anew for this benchmark.

    python toy_pd.py PORT PREFILL_URL DECODE_URL

vLLM ships that file with its tests (tests/v1/kv_connector/nixl_integration), not in its wheel. What is kept of it,
because it decides what it costs: FastAPI routes that parse the request as JSON; an httpx client without timeout and
without limits for each engine; round robin; a first POST for one token with do_remote_decode, its answer read and
parsed; the kv_transfer_params put into the client's body; the decode leg streamed by a generator inside a
StreamingResponse. uvicorn has its defaults, the access log included.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import uuid
from collections.abc import AsyncIterator
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

KEEP_KV = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def new_client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(timeout=None, base_url=f"{url}/v1", limits=limits)


async def prefill(client: httpx.AsyncClient, path: str, body: dict[str, Any], headers: dict[str, str]) -> Any:
    """The `kv_transfer_params` of the prefill engine, if it has any."""
    wanted = {**body, "kv_transfer_params": KEEP_KV, "stream": False, "max_tokens": 1}
    wanted.pop("stream_options", None)
    wanted.pop("min_tokens", None)
    if "max_completion_tokens" in wanted:
        wanted["max_completion_tokens"] = 1
    response = await client.post(path, json=wanted, headers=headers)
    response.raise_for_status()
    return response.json().get("kv_transfer_params")


async def decode(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], headers: dict[str, str]
) -> AsyncIterator[bytes]:
    async with client.stream("POST", path, json=body, headers=headers) as response:
        response.raise_for_status()
        async for chunk in response.aiter_bytes():
            yield chunk


def create_app(prefill_url: str, decode_url: str) -> FastAPI:
    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with new_client(prefill_url) as prefill_client, new_client(decode_url) as decode_client:
            app.state.prefill = itertools.cycle([prefill_client])
            app.state.decode = itertools.cycle([decode_client])
            yield

    app = FastAPI(lifespan=lifespan)

    async def hand_over(path: str, request: Request) -> StreamingResponse:
        body = await request.json()
        headers = {"Authorization": "Bearer none", "X-Request-Id": str(uuid.uuid4())}
        params = await prefill(next(request.app.state.prefill), path, body, headers)
        if params:
            body["kv_transfer_params"] = params
        stream = decode(next(request.app.state.decode), path, body, headers)
        return StreamingResponse(stream, media_type="application/json")

    @app.post("/v1/completions")
    async def completions(request: Request) -> StreamingResponse:
        return await hand_over("/completions", request)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> StreamingResponse:
        return await hand_over("/chat/completions", request)

    return app


if __name__ == "__main__":
    port, prefill_at, decode_at = sys.argv[1:]
    uvicorn.run(create_app(prefill_at, decode_at), host="127.0.0.1", port=int(port))
