"""The process group of one token-parallel group: a root worker and its KV workers."""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed.parallel_state import init_model_parallel_group
from vllm.logger import init_logger
from vllm.platforms import current_platform

from services.decode.token_parallel.context import TokenParallelContext, set_context
from services.decode.token_parallel.grid import WorkerGrid
from services.decode.token_parallel.transport import GlooTransport, NcclTransport, TorchNcclTransport, Transport

logger = init_logger(f"vllm.{__name__}")


def join_group(vllm_config: Any, local_rank: int) -> tuple[Any, TokenParallelContext]:
    """Called by every worker, after vLLM's own groups exist; returns vLLM's group and this process's new context.

    A group holds one worker of each token-parallel rank, all with the same KV heads.
    """
    grid = WorkerGrid.of(vllm_config)
    groups = grid.by_shard(range(grid.num_workers))
    on_host = current_platform.is_cpu()
    group = init_model_parallel_group(
        groups,
        local_rank,
        current_platform.dist_backend,
        group_name="token_parallel",
        use_device_communicator=not on_host,  # on the host it would set up shared-memory collectives that nobody uses
    )
    transport: Transport
    if on_host:
        transport = GlooTransport(group.cpu_group, group.ranks)
    else:
        transport = _nccl_transport(group)
        _meet(transport, group.rank_in_group, grid)
    _, shard = grid.place(torch.distributed.get_rank())
    context = TokenParallelContext(
        rank=group.rank_in_group, size=grid.num_ranks, transport=transport, shard=shard, is_spread=grid.is_spread
    )
    set_context(context)
    return group, context


def _nccl_transport(group: Any) -> Transport:
    communicator = group.device_communicator.pynccl_comm
    if communicator is not None and not communicator.disabled:
        return NcclTransport(communicator)
    # vLLM says nothing when it finds a NCCL that lacks what it wants; the cost must not come unnoticed.
    logger.warning(
        "token parallelism: vLLM's NCCL communicator is disabled, so rows travel over torch.distributed, which takes "
        "about twice as long a layer; install the NCCL that this vLLM was built for (nvidia-nccl)"
    )
    return TorchNcclTransport(group.device_group, group.ranks)


def _meet(transport: Transport, rank: int, grid: WorkerGrid) -> None:
    """Lets those who will exchange rows exchange a word both ways, because NCCL connects at the first transfer, which
    is slow."""
    everybody = [other for other in range(grid.num_ranks) if other != rank]
    others = everybody if grid.is_spread or rank == 0 else [0]
    sends, recvs = ([(torch.zeros(1, device="cuda"), other) for other in others] for _ in range(2))
    transport.wait(transport.start(sends, recvs))
    torch.cuda.synchronize()
