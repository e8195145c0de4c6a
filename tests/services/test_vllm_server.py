from __future__ import annotations

import asyncio
import inspect
import json
import os
import signal
import socket
from argparse import Namespace
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from importlib.metadata import entry_points
from typing import Any

import pytest
from fastapi import FastAPI
from vllm.entrypoints.launchers import launcher
from vllm.entrypoints.launchers.api_server import entry
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.plugins import ENDPOINT_PLUGINS_GROUP, load_endpoint_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser

from services.decode.token_parallel.endpoint import TokenParallelEndpoint
from services.vllm_server import PLUGIN, _serve, kv_transfer_option, option_value, prepare_environment
from tests.services.contract import parameters, require, require_all, source

SERVER = "services/vllm_server.py"
READ = ("VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_NIXL_SIDE_CHANNEL_PORT", "VLLM_PLUGINS")
READ_ON_CPU = ("VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Without what vLLM reads, and put back as it was afterwards."""
    for name in (*READ, *READ_ON_CPU):
        monkeypatch.setenv(name, "to be put back")
        monkeypatch.delenv(name)
    yield monkeypatch
    for name in (*READ, *READ_ON_CPU):
        os.environ.pop(name, None)


@pytest.mark.parametrize(
    ("args", "value"),
    [
        ([], None),
        (["--a", "1"], "1"),
        (["--a=1"], "1"),
        (["--a", "1", "--a=2"], "2"),
        (["--a=2", "--a", "1"], "1"),
        (["--ab", "1"], None),
        (["--a"], None),
        (["--a="], ""),
        (["--a=b=c"], "b=c"),
    ],
)
def test_an_option_s_value_is_the_last_one_given(args: list[str], value: str | None) -> None:
    assert option_value(args, "--a") == value


@pytest.mark.parametrize(("role", "device"), [("kv_producer", "cuda"), ("kv_consumer", "cpu")])
def test_engines_get_our_connector(role: str, device: str) -> None:
    name, value = kv_transfer_option(role, device, ["--port", "1"])
    assert name == "--kv-transfer-config"
    config = json.loads(value)
    assert (config["kv_role"], config["kv_buffer_device"]) == (role, device)
    assert config["kv_load_failure_policy"] == "recompute"
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", "m", name, value])
    assert args.kv_transfer_config.kv_connector == "TokenParallelKVConnector"


@pytest.mark.parametrize("given", [["--kv-transfer-config", "{}"], ["--kv-transfer-config={}"]])
def test_a_connector_that_the_user_chose_stays(given: list[str]) -> None:
    assert kv_transfer_option("kv_producer", "cpu", given) == []


def test_other_engines_are_told_where_this_one_is(environment: pytest.MonkeyPatch) -> None:
    assert prepare_environment("10.1.2.3", 4567, 1) == "cpu"
    assert os.environ["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "10.1.2.3"
    assert os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "4567"
    prepare_environment("10.9.9.9", None, 1)
    assert os.environ["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "10.1.2.3"
    assert int(os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"]) > 1023


def test_our_plugins_are_loaded_beside_all_that_would_be(environment: pytest.MonkeyPatch) -> None:
    prepare_environment("127.0.0.1", None, 1)
    installed = {plugin.name for plugin in entry_points(group="vllm.general_plugins")}
    assert installed | {PLUGIN} <= set(os.environ["VLLM_PLUGINS"].split(","))
    environment.setenv("VLLM_PLUGINS", "one,two")
    prepare_environment("127.0.0.1", None, 1)
    assert os.environ["VLLM_PLUGINS"].split(",") == ["one", PLUGIN, "two"]


def test_more_workers_than_cores_share_them(environment: pytest.MonkeyPatch) -> None:
    environment.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    prepare_environment("127.0.0.1", None, 3)
    assert "OMP_NUM_THREADS" not in os.environ
    prepare_environment("127.0.0.1", None, 4)
    assert (os.environ["VLLM_CPU_OMP_THREADS_BIND"], os.environ["OMP_NUM_THREADS"]) == ("nobind", "1")


def test_vllm_finds_our_entry_points(environment: pytest.MonkeyPatch) -> None:
    (general,) = entry_points(group="vllm.general_plugins", name=PLUGIN)
    assert general.value == "services.decode.token_parallel.plugin:register"
    assert callable(general.load())
    prepare_environment("127.0.0.1", None, 1)
    assert ENDPOINT_PLUGINS_GROUP == "vllm.endpoint_plugins"
    plugins = {plugin.name: plugin for plugin in load_endpoint_plugins(("generate",))}
    assert isinstance(plugins[PLUGIN], TokenParallelEndpoint)


def test_the_endpoint_is_what_vllm_calls_a_plugin() -> None:
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    for name in ("attach_router", "init_state"):
        theirs, ours = parameters(getattr(EndpointPlugin, name)), parameters(getattr(TokenParallelEndpoint, name))
        assert ours == theirs, f"EndpointPlugin.{name} moved; see services/decode/token_parallel/endpoint.py"
    app = FastAPI()
    TokenParallelEndpoint().attach_router(app)
    assert {"/token_parallel", "/token_parallel/transfers"} <= set(app.openapi()["paths"])


def test_the_server_is_run_like_vllm_s_own() -> None:
    require(parameters(entry.build_async_engine_client)[:1] == ["args"], "build_async_engine_client", SERVER)
    serve = parameters(entry.build_and_serve)
    require(serve[:4] == ["engine_client", "listen_address", "sock", "args"], "build_and_serve", SERVER)
    require(parameters(launcher.setup_server) == ["args", "reuse_port"], "setup_server", SERVER)
    steps = ["setup_server(args, reuse_port=False)", "signal.signal(signal.SIGTERM", "run_server_worker("]
    require_all((s for s in steps if s not in source(entry.run_server)), "steps of run_server", SERVER)
    worker = source(entry.run_server_worker)
    steps = ["ToolParserManager.import_tool_parser(", "ReasoningParserManager.import_reasoning_parser("]
    steps += ["build_async_engine_client(", "build_and_serve(", "await shutdown_task", "sock.close()"]
    require_all((s for s in steps if s not in worker), "steps of run_server_worker", SERVER)
    assert inspect.iscoroutinefunction(entry.build_and_serve)
    stop = "partial(engine_client.shutdown, timeout=timeout)"
    require(stop in source(launcher.serve_http), "the end of serve_http", SERVER)


class Engine:
    """As AsyncLLM: it counts as errored once it has been shut down."""

    errored = False

    def shutdown(self, timeout: float | None = None) -> None:
        self.errored = True


@pytest.mark.parametrize(("dies", "is_stopped"), [(False, True), (True, True), (True, False)])
def test_an_engine_that_is_told_to_end_has_not_died(
    dies: bool, is_stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine()

    @asynccontextmanager
    async def build(args: Any) -> AsyncIterator[Engine]:
        yield engine

    async def serve(engine: Engine, *_: Any) -> Any:
        engine.errored = dies
        if is_stopped:
            engine.shutdown(timeout=60)
        return asyncio.sleep(0)

    monkeypatch.setattr(entry, "build_async_engine_client", build)
    monkeypatch.setattr(entry, "build_and_serve", serve)
    monkeypatch.setattr(launcher, "setup_server", lambda args, reuse_port: ("", socket.socket()))
    before = signal.getsignal(signal.SIGTERM)
    try:
        died = asyncio.run(_serve(Namespace(tool_parser_plugin="", reasoning_parser_plugin="")))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert died is dies
