"""How a decode engine gets to know a prefill engine before the first request between them, so that none has to wait for
the connection.

`GET /kv_peer`      of prefill engines: where their KV cache is reached
`POST /kv_peers`    of decode engines: takes that answer as its body; every worker then connects, in the background
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from pydantic import BaseModel, ConfigDict

from services.compatibility import is_token_parallel
from services.engine_call import answered
from services.release import KVLeaseWorker, engine_of

_CONNECTOR = "TokenParallelKVConnector"


class KVPeer(BaseModel):
    """A prefill engine; the fields that vLLM's handshake takes, and whether it streams (kv_transfer.stream_source)."""

    model_config = ConfigDict(extra="forbid")

    engine_id: str
    host: str
    port: int
    tp_size: int
    dcp_size: int
    pp_size: int
    streams: bool = False


class KVPeerWorker:
    """Adds a call to the workers of a decode engine; a base of ours, `--worker-extension-cls` of vLLM's."""

    def connect_kv_peer(self, peer: dict[str, Any]) -> None:
        """See TokenParallelKVConnector.connect_peer; for KVPeer's fields."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        get_kv_transfer_group().connect_peer(**peer)


class KVBothWorker(KVLeaseWorker, KVPeerWorker):
    """Of an engine that may offer and take KV cache."""


EXTENSION_OF_BOTH = f"{KVBothWorker.__module__}.{KVBothWorker.__qualname__}"
EXTENSION = f"{KVPeerWorker.__module__}.{KVPeerWorker.__qualname__}"


def attach(app: FastAPI) -> None:
    """Adds the routes."""
    app.add_api_route("/kv_peer", _read, methods=["GET"])
    app.add_api_route("/kv_peers", _connect, methods=["POST"], status_code=202)


async def _read(request: Request) -> KVPeer:
    from vllm import envs

    config = engine_of(request).vllm_config
    transfer, parallel = config.kv_transfer_config, config.parallel_config
    if transfer is None or not transfer.is_kv_producer:
        raise HTTPException(404, "this engine offers no KV cache")
    if is_token_parallel(config):
        raise HTTPException(404, "this engine's ranks are reached one by one, as each of their offers says")
    return KVPeer(
        engine_id=transfer.engine_id,
        host=envs.VLLM_NIXL_SIDE_CHANNEL_HOST,
        port=envs.VLLM_NIXL_SIDE_CHANNEL_PORT + parallel.data_parallel_index,
        tp_size=parallel.tensor_parallel_size,
        dcp_size=parallel.decode_context_parallel_size,
        pp_size=parallel.pipeline_parallel_size,
        streams=transfer.kv_connector == _CONNECTOR,
    )


async def _connect(request: Request, peer: KVPeer) -> Response:
    engine = engine_of(request)
    transfer = engine.vllm_config.kv_transfer_config
    if transfer is None or not transfer.is_kv_consumer or transfer.kv_connector != _CONNECTOR:
        raise HTTPException(404, "this engine does not connect ahead of its requests")
    await answered(engine, engine.collective_rpc("connect_kv_peer", args=(peer.model_dump(exclude={"streams"}),)))
    return Response(status_code=202)
