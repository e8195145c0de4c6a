"""The decode service: a vLLM engine that pulls the KV cache of prompts and divides it among token-parallel ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from services.kv_peers import EXTENSION, EXTENSION_OF_BOTH
from services.vllm_server import kv_transfer_option, option_value, parsed_args, prepare_environment, serve

if TYPE_CHECKING:
    from services.decode.token_parallel.options import Nodes


def run_decode(
    model: str,
    host: str,
    port: int,
    token_parallel_size: int = 1,
    side_channel_port: int | None = None,
    vllm_args: Sequence[str] = (),
    overlap_from: int | None = None,
    kv_both: bool = False,
    nodes: Nodes | None = None,
    weights: str = "root",
) -> None:
    """Serves until the process is told to end. Without a prefill pool it is an ordinary OpenAI server, which prefills
    itself.

    Args:
        model: path or hub id.
        host, port: of the OpenAI server.
        token_parallel_size: number of token-parallel ranks; 1 is plain vLLM.
        side_channel_port: see `run_prefill`; None picks a free port.
        vllm_args: further options of vLLM's server, by vLLM's names.
        overlap_from, weights: see `TokenParallelOptions`.
        kv_both: whether it can prefill for others too, so that a router may change its role; without token parallelism
            it is then the same engine as `run_prefill`'s.
        nodes: the hosts of this engine, if there are several; on all but the first this process serves no HTTP.

    Raises:
        EngineDiedError: the engine stopped by itself.
        UnsupportedConfigurationError: an option cannot be combined with token parallelism.
    """
    from services.decode.token_parallel.options import TokenParallelOptions

    options = TokenParallelOptions(token_parallel_size, nodes=nodes, overlap_from=overlap_from, weights=weights)
    num_local_ranks = token_parallel_size
    if nodes is not None:
        from services.decode.token_parallel.nodes import prepare_network

        prepare_network(nodes)
        num_local_ranks //= nodes.count
    tensor_parallel_size = int(option_value(vllm_args, "--tensor-parallel-size") or option_value(vllm_args, "-tp") or 1)
    device = prepare_environment(host, side_channel_port, tensor_parallel_size * num_local_ranks)

    from services.decode.token_parallel.engine_args import engine_args

    additional_config = json.loads(option_value(vllm_args, "--additional-config") or "{}")
    # Usage tells what was cached, as OpenAI's does; the prefill engine's share comes with the KV cache.
    transfer = kv_transfer_option("kv_both" if kv_both else "kv_consumer", device, vllm_args)
    if transfer and token_parallel_size == 1 and option_value(vllm_args, "--worker-extension-cls") is None:
        transfer += ["--worker-extension-cls", EXTENSION_OF_BOTH if kv_both else EXTENSION]
    vllm_args = [*transfer, "--enable-prompt-tokens-details", *vllm_args]
    on_ray = option_value(vllm_args, "--distributed-executor-backend") == "ray"
    overrides = engine_args(options, additional_config, on_ray, tensor_parallel_size)
    if nodes is None or nodes.rank == 0:
        serve(model, host, port, vllm_args, overrides)
    else:
        from services.decode.token_parallel.headless import run_ranks

        run_ranks(parsed_args(model, host, port, vllm_args, overrides))
