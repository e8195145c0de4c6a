"""What one worker reports about itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

from services.decode.token_parallel.context import TokenParallelContext


def worker_status(context: TokenParallelContext, layers: Mapping[str, Any], parameter_bytes: int) -> dict[str, Any]:
    """Bytes and seconds since start; the executor adds the pool's state, which the scheduler knows."""
    storages = {
        layer.kv_cache.untyped_storage().data_ptr(): layer.kv_cache.untyped_storage().nbytes()
        for layer in layers.values()
    }
    graph_step = context.graphs.step if context.graphs is not None else None
    received = getattr(get_kv_transfer_group(), "kv_bytes_received", 0) if has_kv_transfer_group() else 0
    return {
        "rank": context.rank,
        "pid": os.getpid(),
        "kv_cache_bytes": sum(storages.values()),
        "kv_bytes_received": received,
        "parameter_bytes": parameter_bytes,
        "step_seconds": context.clock.step_seconds,
        "wait_seconds": context.clock.wait_seconds,
        "num_steps": context.clock.num_steps,
        "graph_rows": 0 if graph_step is None else graph_step.size,  # of the last step's CUDA graph
        "num_micro_batches": len(graph_step.micro_batches) if graph_step is not None else 1,  # of the last step
    }


def block_report(context: TokenParallelContext, layers: Mapping[str, Any]) -> dict[str, Any]:
    """Local ids of the blocks that hold anything but zeros in any layer, and of those that this rank's requests ever
    owned."""
    written: set[int] = set()
    for layer in layers.values():
        cache = layer.kv_cache
        written.update(torch.nonzero(cache.flatten(1).any(dim=1)).flatten().tolist())
    assert context.batch is not None
    return {"rank": context.rank, "written": sorted(written), "owned": sorted(context.batch.ever_owned)}
