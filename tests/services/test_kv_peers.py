"""How a decode engine hears of a prefill engine, against the real routes and a recorded engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from kv_transfer.connector import TokenParallelKVConnector
from services import kv_peers, release
from services.decode.token_parallel.engine_args import engine_args
from services.decode.token_parallel.kv_worker import KVWorker
from services.decode.token_parallel.options import TokenParallelOptions
from services.decode.token_parallel.worker import RootWorker

PEER = {"engine_id": "e", "host": "10.0.0.1", "port": 5600, "tp_size": 2, "dcp_size": 1, "pp_size": 1}


class Engine:
    errored = False

    def __init__(self, role: str, connector: str = "TokenParallelKVConnector", num_ranks: int = 1) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.vllm_config = SimpleNamespace(
            kv_transfer_config=SimpleNamespace(
                engine_id="e",
                kv_connector=connector,
                is_kv_producer=role == "kv_producer",
                is_kv_consumer=role == "kv_consumer",
            ),
            parallel_config=SimpleNamespace(
                data_parallel_index=0,
                tensor_parallel_size=2,
                decode_context_parallel_size=1,
                pipeline_parallel_size=1,
                worker_cls=engine_args(TokenParallelOptions(num_ranks)).get("worker_cls", "auto"),
            ),
        )

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> None:
        self.calls.append((method, *args))


def client(engine: Engine, *keys: str) -> TestClient:
    app = FastAPI()
    kv_peers.attach(app)
    release.init(engine, app.state, keys)
    return TestClient(app)


def test_what_a_prefill_engine_tells_is_what_a_decode_engine_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_HOST", "10.0.0.1")
    monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", "5600")
    told = client(Engine("kv_producer")).get("/kv_peer").json()
    assert told == {**PEER, "streams": True}
    decode = Engine("kv_consumer")
    assert client(decode).post("/kv_peers", json=told).status_code == 202
    assert decode.calls == [("connect_kv_peer", PEER)]


def test_every_worker_of_a_decode_engine_can_take_it() -> None:
    for worker in (KVWorker, RootWorker, kv_peers.KVPeerWorker):
        assert hasattr(worker, "connect_kv_peer")
    assert hasattr(TokenParallelKVConnector, "connect_peer")


@pytest.mark.parametrize("engine", [Engine("kv_producer"), Engine("kv_consumer", "NixlConnector")])
def test_others_connect_to_nobody(engine: Engine) -> None:
    assert client(engine).post("/kv_peers", json=PEER).status_code == 404
    assert engine.calls == []


@pytest.mark.parametrize("engine", [Engine("kv_consumer"), Engine("kv_producer", num_ranks=2)], ids=["reader", "ranks"])
def test_a_decode_engine_is_not_read_as_a_whole(engine: Engine) -> None:
    assert client(engine).get("/kv_peer").status_code == 404


def test_an_engine_with_a_key_wants_it_here_too() -> None:
    engine = Engine("kv_consumer")
    assert client(engine, "secret").post("/kv_peers", json=PEER).status_code == 401
    assert engine.calls == []
