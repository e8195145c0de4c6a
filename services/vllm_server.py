"""Runs one vLLM OpenAI server in this process, with the options of a tknp service on top of the user's own."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

from tknp.common.ports import free_port
from tknp.common.versions import check_vllm_version


class EngineDiedError(RuntimeError):
    """The engine stopped by itself, not because somebody asked."""


PLUGIN = "tknp"
"""Name of our entry points in vLLM's plugin groups."""
_PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
    "vllm.io_processor_plugins",
)


def kv_transfer_option(role: str, device: str, vllm_args: Sequence[str]) -> list[str]:
    """`--kv-transfer-config` for TokenParallelKVConnector; nothing where the user gave one.

    Args:
        role: kv_producer or kv_consumer.
        device: cpu or cuda, where the KV cache lies.
    """
    if any(arg.split("=")[0] == "--kv-transfer-config" for arg in vllm_args):
        return []
    config = {
        "kv_connector": "TokenParallelKVConnector",
        "kv_connector_module_path": "kv_transfer.connector",
        "kv_role": role,
        "kv_buffer_device": device,
        # A pull that fails costs a prefill on the decode engine, not the request.
        "kv_load_failure_policy": "recompute",
    }
    return ["--kv-transfer-config", json.dumps(config)]


def option_value(vllm_args: Sequence[str], name: str) -> str | None:
    """The value of a `--name value` or `--name=value` among vLLM's options, the last one given."""
    value = None
    for index, arg in enumerate(vllm_args):
        if arg == name and index + 1 < len(vllm_args):
            value = vllm_args[index + 1]
        elif arg.startswith(f"{name}="):
            value = arg.removeprefix(f"{name}=")
    return value


def prepare_environment(host: str, side_channel_port: int | None, num_workers: int) -> str:
    """Sets what vLLM reads from the environment, where the user did not, and returns the device type.

    Args:
        host: address that the server listens on; other engines reach this one there, or, if that is every address, at
            the one that VLLM_HOST_IP names.
        side_channel_port: where decode engines ask for a prefill engine's memory layout; None picks a free port.
        num_workers: worker processes of this engine.
    """
    check_vllm_version()
    os.environ.setdefault("VLLM_NIXL_SIDE_CHANNEL_HOST", _address_for_others(host))
    os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(side_channel_port or free_port())
    # vLLM loads endpoint plugins only when they are named, and then no other plugin that is not: so name all.
    known = {entry.name for group in _PLUGIN_GROUPS for entry in entry_points(group=group)}
    named = os.environ.get("VLLM_PLUGINS")
    os.environ["VLLM_PLUGINS"] = ",".join(sorted({PLUGIN, *(known if named is None else named.split(","))}))

    from vllm.platforms import current_platform

    device = str(current_platform.device_type)
    cores = len(os.sched_getaffinity(0))
    if device == "cpu" and cores < 2 * num_workers:
        # vLLM binds each worker to cores of its own and refuses when there are not enough.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_workers)))
    return device


def _address_for_others(host: str) -> str:
    if host not in ("0.0.0.0", "::"):
        return host
    from vllm.utils.network_utils import get_ip

    return str(get_ip())  # VLLM_HOST_IP, or the address that this machine speaks to the outside from


def serve(
    model: str, host: str, port: int, vllm_args: Sequence[str], overrides: Mapping[str, Any] | None = None
) -> None:
    """Parses vLLM's own options and serves until the process is told to end.

    Args:
        vllm_args: options of vLLM's API server, by vLLM's names.
        overrides: values of its options that are not the user's to give.
    """
    import uvloop

    if uvloop.run(_serve(parsed_args(model, host, port, vllm_args, overrides))):
        raise EngineDiedError(f"the engine on port {port} has died; the reason stands above, in the engine's own log")


def parsed_args(
    model: str, host: str, port: int, vllm_args: Sequence[str], overrides: Mapping[str, Any] | None = None
) -> Any:
    """vLLM's server options as its own parser gives them; see `serve`."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="tknp"))
    args = parser.parse_args(["--model", model, "--host", host, "--port", str(port), *vllm_args])
    for name, value in (overrides or {}).items():
        setattr(args, name, value)
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    return args


async def _serve(args: Any) -> bool:
    """vLLM's `run_server` (entrypoints/launchers/api_server/entry.py), which does not tell how it ended.

    Returns whether the engine died.
    """
    import signal

    from vllm.entrypoints.launchers.api_server.entry import build_and_serve, build_async_engine_client
    from vllm.entrypoints.launchers.launcher import setup_server
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt("terminated")

    # Until the HTTP server installs handlers of its own.
    signal.signal(signal.SIGTERM, interrupt)
    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
    listen_address, sock = setup_server(args, reuse_port=False)
    async with build_async_engine_client(args) as engine:
        was_errored = _noting_shutdown(engine)
        shutdown = await build_and_serve(engine, listen_address, sock, args)
        died = was_errored[0] if was_errored else bool(engine.errored)
    # The server ends its connections only after the engine is gone.
    try:
        await shutdown
    finally:
        sock.close()
    return died


def _noting_shutdown(engine: Any) -> list[bool]:
    """Filled when the server, told to end, shuts the engine down: whether it had died before. From then on it counts as
    errored in any case (vLLM's launcher.py, `handle_shutdown`)."""
    was_errored: list[bool] = []
    shutdown = engine.shutdown

    def noting(*args: Any, **kwargs: Any) -> None:
        was_errored.append(bool(engine.errored))
        shutdown(*args, **kwargs)

    engine.shutdown = noting
    return was_errored
