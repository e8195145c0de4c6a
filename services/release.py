"""What a router asks of an engine beside tokens: to drop a request that came to nothing, and the KV cache kept for it.

`POST /requests/{id}/abort`        every engine; answers once the engine knows nothing of the request any more
`POST /kv_leases/{id}/release`     engines that keep KV cache; what is under this lease goes with the next step
`GET  /kv_roles`                   every engine; whether it can prefill for others, decode for them, or both

Without them a client that hangs up between a prefill engine's answer and the decode engine's acceptance would leave its
KV cache held until vLLM's lease ends, 30 s later. An engine that was started with vLLM's `--api-key` wants it here too.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response

from services.compatibility import is_token_parallel, kv_roles
from services.engine_call import answered


class KVLeaseWorker:
    """Adds a call to the workers of a prefill engine; `--worker-extension-cls`."""

    def release_kv_lease(self, lease_id: str) -> None:
        """See TokenParallelKVConnector.release_lease."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        get_kv_transfer_group().release_lease(lease_id)


EXTENSION = f"{KVLeaseWorker.__module__}.{KVLeaseWorker.__qualname__}"
_RELEASING = (EXTENSION, "services.kv_peers.KVBothWorker")  # by its name, since that module builds on this one


def attach(app: FastAPI) -> None:
    """Adds the routes."""
    app.add_api_route("/requests/{request_id:path}/abort", _abort, methods=["POST"], status_code=204)
    app.add_api_route("/kv_leases/{lease_id}/release", _release, methods=["POST"], status_code=204)
    app.add_api_route("/kv_roles", _read_roles, methods=["GET"])


def init(engine_client: Any, state: Any, api_keys: Sequence[str]) -> None:
    """What the routes need; called once the engine is there. `api_keys` are the engine's `--api-key`, if it has any;
    otherwise it is VLLM_API_KEY, as on vLLM's own routes (entrypoints/serve/middleware/register.py)."""
    state.tknp_engine = engine_client
    keys = api_keys or (os.environ.get("VLLM_API_KEY", ""),)
    state.tknp_api_keys = [f"Bearer {key}".encode() for key in keys if key]


def engine_of(request: Request) -> Any:
    """Raises HTTPException if the request lacks the engine's key. vLLM guards its own routes only."""
    shown = request.headers.get("authorization", "").encode()
    keys: list[bytes] = request.app.state.tknp_api_keys
    if keys and not any(hmac.compare_digest(shown, key) for key in keys):
        raise HTTPException(401, "this engine was started with --api-key, and the request shows no such key")
    return request.app.state.tknp_engine


async def _abort(request: Request, request_id: str) -> Response:
    engine = engine_of(request)
    # The names that vLLM's servers of the APIs give a request with this X-Request-Id, or this `request_id`.
    await answered(engine, engine.abort((f"cmpl-{request_id}-0", f"chatcmpl-{request_id}", f"resp_{request_id}_0")))
    # The engine takes messages in order: with this answer, the abort before it has happened.
    await answered(engine, engine.is_sleeping())
    return Response(status_code=204)


async def _read_roles(request: Request) -> dict[str, list[str]]:
    return {"roles": kv_roles(request.app.state.tknp_engine.vllm_config)}


async def _release(request: Request, lease_id: str) -> Response:
    engine = engine_of(request)
    config = engine.vllm_config
    if config.parallel_config.worker_extension_cls not in _RELEASING and not is_token_parallel(config):
        raise HTTPException(404, "this engine keeps no KV cache under a lease that can be released")
    await answered(engine, engine.collective_rpc("release_kv_lease", args=(lease_id,)))
    return Response(status_code=204)
