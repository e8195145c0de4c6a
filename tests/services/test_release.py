"""What a router asks of an engine when a request comes to nothing, against the real routes and a recorded engine."""

from __future__ import annotations

import asyncio
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.config import KVTransferConfig
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.worker.worker_base import WorkerWrapperBase

from services import engine_call, kv_peers, release
from services.decode.token_parallel.engine_args import engine_args
from services.decode.token_parallel.kv_worker import KVWorker
from services.decode.token_parallel.options import TokenParallelOptions
from services.decode.token_parallel.worker import RootWorker
from tests.services.contract import require, source


class Engine:
    """What AsyncLLM is asked for, in order."""

    errored = False

    def __init__(self, extension: str = release.EXTENSION, worker: str = "auto") -> None:
        self.calls: list[tuple[Any, ...]] = []
        parallel = SimpleNamespace(worker_extension_cls=extension, worker_cls=worker)
        self.vllm_config = SimpleNamespace(parallel_config=parallel)

    async def abort(self, names: Any) -> None:
        self.calls.append(("abort", *names))

    async def is_sleeping(self) -> bool:
        self.calls.append(("is_sleeping",))
        return False

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> None:
        self.calls.append((method, *args))


def client(engine: Engine, *keys: str) -> TestClient:
    app = FastAPI()
    release.attach(app)
    release.init(engine, app.state, keys)
    return TestClient(app)


def test_an_abort_is_answered_after_the_engine_has_taken_it() -> None:
    engine = Engine()
    assert client(engine).post("/requests/r%2F1/abort").status_code == 204
    assert engine.calls == [("abort", "cmpl-r/1-0", "chatcmpl-r/1", "resp_r/1_0"), ("is_sleeping",)]


@pytest.mark.parametrize(
    "engine", [Engine(), Engine("", engine_args(TokenParallelOptions(2))["worker_cls"])], ids=["one", "ranks"]
)
def test_a_release_reaches_the_workers(engine: Engine) -> None:
    assert client(engine).post("/kv_leases/abc/release").status_code == 204
    assert engine.calls == [("release_kv_lease", "abc")]
    assert all(hasattr(worker, engine.calls[0][0]) for worker in (release.KVLeaseWorker, RootWorker, KVWorker))


def test_an_engine_without_our_workers_has_nothing_to_release() -> None:
    engine = Engine(extension="")
    assert client(engine).post("/kv_leases/abc/release").status_code == 404
    assert engine.calls == []


@pytest.mark.parametrize(
    ("kv_role", "roles"),
    [("kv_producer", ["prefill"]), ("kv_consumer", ["decode"]), ("kv_both", ["prefill", "decode"]), (None, [])],
)
def test_an_engine_says_which_roles_it_can_take(kv_role: str | None, roles: list[str]) -> None:
    engine = Engine()
    transfer = None if kv_role is None else KVTransferConfig(kv_connector="NixlConnector", kv_role=kv_role)
    engine.vllm_config.kv_transfer_config = transfer
    assert client(engine).get("/kv_roles").json() == {"roles": roles}


@pytest.mark.parametrize("path", ["/requests/r/abort", "/kv_leases/abc/release"])
def test_an_engine_with_keys_wants_one(path: str) -> None:
    engine = Engine()
    asking = client(engine, "one", "two")
    for headers in ({}, {"Authorization": "Bearer three"}, {"Authorization": "one"}):
        assert asking.post(path, headers=headers).status_code == 401
    assert engine.calls == []
    assert asking.post(path, headers={"Authorization": "Bearer two"}).status_code == 204


@pytest.mark.parametrize(("has_died", "why"), [(True, "the engine has died"), (False, "within 1 s; it is busy")])
def test_an_engine_that_does_not_answer_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch, has_died: bool, why: str
) -> None:
    """Or its server would wait for the handler, and never end."""

    class Silent(Engine):
        errored = has_died

        async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> None:
            await asyncio.Event().wait()

    monkeypatch.setattr(engine_call, "CALL_SECONDS", 1.0)
    monkeypatch.setattr(engine_call, "LOOK_SECONDS", 0.1)
    reply = client(Silent()).post("/kv_leases/abc/release")
    assert reply.status_code == 503 and why in reply.json()["detail"]


BY = "services/release.py"


def test_vllm_names_requests_by_our_header_as_the_abort_does() -> None:
    require('f"cmpl-{self._base_request_id(' in inspect.getsource(OpenAIServingCompletion), "a completion's id", BY)
    require('f"{request_id}-{i}"' in inspect.getsource(OpenAIServingCompletion), "the id of each prompt", BY)
    require('f"chatcmpl-{self._base_request_id(' in inspect.getsource(OpenAIServingChat), "a chat's id", BY)


def test_vllm_takes_aborts_by_external_id_and_workers_take_more_methods() -> None:
    require("self.output_processor.abort_requests(request_ids, internal)" in source(AsyncLLM.abort), "abort", BY)
    require("is_sleeping_async" in source(AsyncLLM.is_sleeping), "a question that is answered in order", BY)
    require("worker_extension_cls" in source(WorkerWrapperBase.init_worker), "--worker-extension-cls", BY)


def test_a_key_from_the_environment_is_wanted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM takes VLLM_API_KEY where there is no --api-key: a key on the command line can be seen by others."""
    monkeypatch.setenv("VLLM_API_KEY", "sk-env")
    engine = Engine()
    asked = client(engine)
    assert asked.post("/requests/r/abort").status_code == 401
    assert asked.post("/requests/r/abort", headers={"Authorization": "Bearer sk-env"}).status_code == 204
    assert (
        client(engine, "sk-option").post("/requests/r/abort", headers={"Authorization": "Bearer sk-env"}).status_code
        == 401
    )


def test_an_engine_that_also_takes_kv_cache_releases_leases_too() -> None:
    engine = Engine(kv_peers.EXTENSION_OF_BOTH)
    assert client(engine).post("/kv_leases/l1/release").status_code == 204
    assert engine.calls == [("release_kv_lease", "l1")]
