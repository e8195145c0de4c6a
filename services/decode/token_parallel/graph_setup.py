"""Whether an engine can replay decode steps as FULL CUDA graphs, and what that takes at start."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.distributed.parallel_state import get_tp_group, get_world_group, in_the_same_node_as
from vllm.logger import init_logger
from vllm.platforms import current_platform

from services.decode.token_parallel.all_reduce import install, tell_of_no_overlap
from services.decode.token_parallel.exchange import Exchange, SymmetricMemory
from services.decode.token_parallel.graph_model import GraphModel
from services.decode.token_parallel.graphs import Graphs
from services.decode.token_parallel.micro_batch import GraphSizes, overlap_threshold
from services.decode.token_parallel.options import TokenParallelOptions
from services.decode.token_parallel.rows import RowLayout
from services.decode.token_parallel.spread import SpreadGraphs

logger = init_logger(f"vllm.{__name__}")

_ALIGNED = 64
"""Elements of which a row on the wire has a multiple, as symmetric_kernels.put_rows wants them."""


def make_graphs(vllm_config: Any, group: Any, layers: Mapping[str, Any], device: torch.device) -> Graphs | None:
    """Called by root and KV workers once they have their attention layers; None where steps are sent layer by layer.

    Args:
        group: vLLM's token-parallel group.
    """
    mode = vllm_config.compilation_config.cudagraph_mode
    if not current_platform.is_cuda() or mode is None or mode.decode_mode() != CUDAGraphMode.FULL:
        return None
    # Of all groups: the T roots of an engine must agree, since they compute together.
    world = get_world_group().cpu_group
    if not all(in_the_same_node_as(world, source_rank=0)):
        logger.warning(
            "token parallelism: its ranks are on several machines, which share no memory, so rows travel over NCCL and "
            "decode steps replay no FULL CUDA graphs"
        )
        return None
    if not _reach_one_another(world, device):
        logger.warning(
            "token parallelism: not all of its GPUs can access one another's memory (nvidia-smi topo -p2p rw shows "
            "which), so rows travel over NCCL and decode steps replay no FULL CUDA graphs"
        )
        return None
    dtype = vllm_config.model_config.dtype
    layouts = [RowLayout.of(layer) for layer in layers.values()]
    limit = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    max_rows = max(1, min(limit, vllm_config.scheduler_config.max_num_seqs))
    if TokenParallelOptions.of(vllm_config).is_spread:
        return _make_spread_graphs(group, layouts, list(layers), max_rows, dtype, device)
    width = max(max(sum(layout.widths), layout.num_heads * layout.head_size_v) for layout in layouts)
    width = -(-width // _ALIGNED) * _ALIGNED  # rows begin where any vector load may begin
    num_bytes = Exchange.num_bytes(group.world_size, max_rows, width, dtype)
    memory = SymmetricMemory(group.device_group, num_bytes, device)
    exchange = Exchange(memory, group.rank_in_group, group.world_size, max_rows, width, dtype)
    return Graphs(exchange, list(layers))


def _make_spread_graphs(
    group: Any, layouts: list[RowLayout], names: list[str], max_rows: int, dtype: torch.dtype, device: torch.device
) -> SpreadGraphs | None:
    widths = {layout.num_heads * size for layout in layouts for size in (layout.head_size, layout.head_size_v)}
    if any(width % _ALIGNED for width in widths):
        logger.warning(
            "token parallelism: a rank's query heads have %s elements, which are no multiples of %d, so they travel "
            "over NCCL and decode steps replay no FULL CUDA graphs",
            sorted(widths),
            _ALIGNED,
        )
        return None
    size, width = group.world_size, max(widths)
    memory = SymmetricMemory(group.device_group, Exchange.num_bytes(size, max_rows * size, width, dtype), device)
    exchange = Exchange(memory, group.rank_in_group, size, max_rows * size, width, dtype, peers=(0, size))
    return SpreadGraphs(exchange, names)


def _reach_one_another(group: Any, device: torch.device) -> bool:
    """Whether each device of the group can write to every other's memory; all ranks get the same answer."""
    size = torch.distributed.get_world_size(group)
    devices: list[Any] = [None] * size
    torch.distributed.all_gather_object(devices, device.index, group=group)
    others = [index for index in devices if index != device.index]
    votes: list[Any] = [None] * size
    mine = all(torch.cuda.can_device_access_peer(device.index, other) for other in others)
    torch.distributed.all_gather_object(votes, mine, group=group)
    return all(votes)


def leave_out_fusion(vllm_config: Any) -> None:
    """Before the workers start: switches off FlashInfer's all-reduce fused with RMS norm, whose workspace two
    micro-batches can't share."""
    passes = vllm_config.compilation_config.pass_config
    if (
        vllm_config.parallel_config.tensor_parallel_size > 1
        and passes.fuse_allreduce_rms
        and TokenParallelOptions.of(vllm_config).overlap_from != 0
        and _shared_by_streams(vllm_config.model_config) is None
    ):
        passes.fuse_allreduce_rms = False
        logger.info(
            "token parallelism: all-reduces are not fused with RMS norm, so that two micro-batches can overlap; "
            "--token-parallel-overlap-from 0 keeps the fusion"
        )


def make_graph_model(vllm_config: Any, model: Any, graphs: Graphs, layers: Mapping[str, Any]) -> GraphModel:
    """On the root: the model for graphs of one micro-batch and, from `graphs.sizes.overlap_from` rows on, of two."""
    overlap = _overlap_from(vllm_config, layers.values(), model.parameters())
    if overlap is not None and (reason := _shared_by_streams(vllm_config.model_config)) is not None:
        tell_of_no_overlap(reason)
        overlap = None
    all_reduces = None
    if overlap is not None and vllm_config.parallel_config.tensor_parallel_size > 1:
        all_reduces = install(vllm_config, get_tp_group(), graphs.exchange.max_rows)
        overlap = overlap if all_reduces is not None else None
    graphs.sizes = GraphSizes((), overlap)
    return GraphModel(model, graphs, all_reduces)


def _shared_by_streams(model_config: Any) -> str | None:
    """What two micro-batches, each on a stream of its own, would both use in a model that is not dense and plain."""
    if model_config.get_num_experts():
        # model_executor/layers/fused_moe: shared experts fork to one auxiliary stream, and experts take their scratch
        # memory from v1/worker/workspace.py.
        return "experts keep scratch memory and a stream of their own, which two micro-batches can't share"
    if model_config.quantization is not None:
        return (
            f"kernels of {model_config.quantization} weights may keep workspaces, which two micro-batches can't share"
        )
    return None


def _overlap_from(vllm_config: Any, layers: Iterable[Any], parameters: Iterable[torch.Tensor]) -> int | None:
    """Rows from which decode steps can run in two micro-batches; None for never."""
    options = TokenParallelOptions.of(vllm_config)
    if options.overlap_from is not None:
        return options.overlap_from or None
    layouts = [RowLayout.of(layer) for layer in layers]
    item = vllm_config.model_config.dtype.itemsize
    kv_bytes = item * sum(sum(layout.widths[1:]) for layout in layouts)
    weight_bytes = sum(parameter.nbytes for parameter in parameters)
    return overlap_threshold(weight_bytes, kv_bytes, vllm_config.model_config.max_model_len, options.size)


def captured_sizes(cudagraph_manager: Any, known: GraphSizes) -> GraphSizes:
    """What vLLM's runner has captured for decode steps, with what is known of it."""
    descriptors = cudagraph_manager.graphs if cudagraph_manager is not None else {}
    sizes = {d.num_tokens for d in descriptors if d.cg_mode == CUDAGraphMode.FULL and d.uniform_token_count == 1}
    return replace(known, sizes=tuple(sorted(sizes)))
