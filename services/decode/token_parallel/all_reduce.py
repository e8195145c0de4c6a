"""All-reduces of a tensor-parallel root whose two micro-batches run at the same time.

vLLM's custom all-reduce keeps one set of buffers and barriers, FlashInfer's one workspace, and NCCL puts all calls of a
communicator in one order. Two streams that reduce through the same one would read each other's rows or wait for each
other for ever, so the second micro-batch gets a custom all-reduce of its own. vLLM's own micro-batches (--enable-dbo)
don't need one: they compute on one stream, by turns.

Within a micro-batch all ranks reduce in the order of the model's layers. Between the two there is no order: each
all-reduce takes a few multiprocessors while it waits, and whatever else runs comes to its end on the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.distributed.device_communicators.custom_all_reduce import CustomAllreduce
from vllm.distributed.device_communicators.pynccl_allocator import is_symmetric_memory_enabled
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")


class AllReduceOfEach:
    """Stands where vLLM keeps its custom all-reduce (`CudaCommunicator.ca_comm`), and answers with that of the
    micro-batch whose layers are being captured."""

    def __init__(self, first: Any, second: Any) -> None:
        """Args:
        first: vLLM's own `CustomAllreduce`.
        second: another one over the same group.
        """
        self._first, self._second = first, second
        self._current = first

    def __getattr__(self, name: str) -> Any:
        return getattr(self._current, name)

    @contextmanager
    def of(self, micro_batch: int) -> Iterator[None]:
        """Inside, all-reduces are those of one micro-batch."""
        self._current = self._second if micro_batch else self._first
        try:
            yield
        finally:
            self._current = self._first

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Called by vLLM round all captures (`GroupCoordinator.graph_capture`): at its end the ranks tell one another
        where the buffers are that graphs reduce."""
        with self._first.capture(), self._second.capture():
            yield

    def should_custom_ar(self, rows: torch.Tensor) -> bool:
        """Whether `rows` are reduced here.

        Raises:
            RuntimeError: they are the second micro-batch's and not of a kind that is: vLLM would go on to one that the
                first is using.
        """
        fits = bool(self._current.should_custom_ar(rows))
        if not fits and self._current is self._second:
            raise RuntimeError(
                f"the second micro-batch can't reduce {tuple(rows.shape)} of {rows.dtype} in buffers of its own; "
                "start the engine with --token-parallel-overlap-from 0 and report this"
            )
        return fits


def tell_of_no_overlap(reason: str) -> None:
    """Says in the log why decode steps run in one micro-batch."""
    logger.warning(
        "token parallelism: decode steps run in one micro-batch, so the root computes while the others wait: %s", reason
    )


def install(vllm_config: Any, tp_group: Any, max_rows: int) -> AllReduceOfEach | None:
    """Gives the second micro-batch its own all-reduce; None, with the reason in the log, where it can't have one.

    Called by all ranks of the root's tensor-parallel group at the same time, and answered alike.

    Args:
        tp_group: vLLM's group.
        max_rows: rows of a micro-batch.
    """
    communicator = tp_group.device_communicator
    reason = _agreed(tp_group, _obstacle(vllm_config, communicator))
    if reason is None:
        second = _second(vllm_config, tp_group, max_rows)
        reason = _agreed(tp_group, "vLLM's custom all-reduce has no second set of buffers" if second.disabled else None)
    if reason is not None:
        tell_of_no_overlap(reason)
        return None
    # vLLM asks these before the custom one, and both micro-batches would use them.
    communicator.fi_ar_comm = communicator.fi_pcie_ipc_ar_comm = None
    pair = communicator.ca_comm = AllReduceOfEach(communicator.ca_comm, second)
    return pair


def _second(vllm_config: Any, tp_group: Any, max_rows: int) -> Any:
    model = vllm_config.model_config
    gathers = 1 << 20  # bytes; it only reduces
    return CustomAllreduce(
        tp_group.cpu_group,
        tp_group.device_communicator.device,
        max_size=(max_rows + 1) * model.get_hidden_size() * model.dtype.itemsize,
        max_all_gather_size=gathers,
        max_mnnvl_all_gather_size=gathers,
        max_reduce_scatter_size=gathers,
        max_mnnvl_reduce_scatter_size=gathers,
        register_graph_buffers=not vllm_config.use_cumem_cudagraph_pool,
    )


def _obstacle(vllm_config: Any, communicator: Any) -> str | None:
    """Why the second micro-batch can't reduce on its own."""
    own = communicator.ca_comm
    obstacles = {
        "vLLM's custom all-reduce is off (--disable-custom-all-reduce, or GPUs that can't reach one another)": (
            own is None or own.disabled
        ),
        "NCCL's symmetric memory is on (VLLM_USE_NCCL_SYMM_MEM), and it has one communicator": (
            is_symmetric_memory_enabled()
        ),
        "all-reduces are fused with RMS norm (fuse_allreduce_rms), in one workspace": bool(
            vllm_config.compilation_config.pass_config.fuse_allreduce_rms
        ),
    }
    return next((reason for reason, present in obstacles.items() if present), None)


def _agreed(tp_group: Any, reason: str | None) -> str | None:
    """The reason of the first rank that has one."""
    reasons: list[str | None] = [None] * tp_group.world_size
    torch.distributed.all_gather_object(reasons, reason, group=tp_group.cpu_group)
    return next((one for one in reasons if one is not None), None)
