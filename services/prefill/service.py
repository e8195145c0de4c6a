"""The prefill service: a vLLM engine that computes the KV cache of prompts and keeps it until a decode engine has
pulled it."""

from __future__ import annotations

from collections.abc import Sequence

from services.release import EXTENSION
from services.vllm_server import kv_transfer_option, option_value, prepare_environment, serve


def run_prefill(
    model: str,
    host: str,
    port: int,
    side_channel_port: int | None = None,
    vllm_args: Sequence[str] = (),
    kv_both: bool = False,
) -> None:
    """Serves until the process is told to end.

    Args:
        model: path or hub id.
        host, port: of the OpenAI server; decode engines reach the engine at `host` too.
        side_channel_port: where decode engines ask for this engine's memory layout; None picks a free port.
        vllm_args: further options of vLLM's server, by vLLM's names.
        kv_both: whether it can decode too, so that a router may change its role.
    """
    num_workers = int(option_value(vllm_args, "--tensor-parallel-size") or option_value(vllm_args, "-tp") or 1)
    device = prepare_environment(host, side_channel_port, num_workers)
    transfer = kv_transfer_option("kv_both" if kv_both else "kv_producer", device, vllm_args)
    if transfer and option_value(vllm_args, "--worker-extension-cls") is None:
        transfer += ["--worker-extension-cls", EXTENSION]
    if kv_both:
        transfer.append("--enable-prompt-tokens-details")  # as decode engines have it
    serve(model, host, port, [*transfer, *vllm_args])
