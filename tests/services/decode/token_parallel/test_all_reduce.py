"""Which buffers a micro-batch's all-reduces use. The kernels need GPUs (tests/gpu); who is asked does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.device_communicators.cuda_communicator import CudaCommunicator

from services.decode.token_parallel import all_reduce
from services.decode.token_parallel.all_reduce import install

ROWS = torch.ones(4, 16)


class Buffers:
    """Stands for one `CustomAllreduce`, which can't be made without GPUs; its sum tells whose buffers it went
    through."""

    def __init__(self, name: float, largest: int = 1 << 20) -> None:
        self.name, self.largest, self.disabled = name, largest, False
        self.captures: list[str] = []

    def should_custom_ar(self, rows: torch.Tensor) -> bool:
        return int(rows.nbytes) < self.largest

    def custom_all_reduce(self, rows: torch.Tensor) -> torch.Tensor:
        return rows * self.name

    @contextmanager
    def capture(self) -> Iterator[None]:
        self.captures.append("begun")
        yield
        self.captures.append("registered")


def communicator(buffers: Any) -> Any:
    """vLLM's own dispatch over `buffers`; nothing else that reduces is there."""
    made = CudaCommunicator.__new__(CudaCommunicator)
    made.ca_comm = buffers
    made.fi_ar_comm = made.fi_pcie_ipc_ar_comm = made.pynccl_comm = made.qr_comm = made.aiter_ar_comm = None
    made.symm_mem_comm = None
    made.use_aiter_allreduce = False
    made.device = torch.device("cpu")
    return made


def config(fused: bool = False) -> Any:
    return SimpleNamespace(
        compilation_config=SimpleNamespace(pass_config=SimpleNamespace(fuse_allreduce_rms=fused)),
        model_config=SimpleNamespace(get_hidden_size=lambda: 16, dtype=torch.bfloat16),
        use_cumem_cudagraph_pool=False,
    )


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[Any]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    made: list[dict[str, Any]] = []

    def second(cpu_group: Any, device: Any, **options: Any) -> Buffers:
        made.append(options)
        return Buffers(3.0, largest=options["max_size"])

    monkeypatch.setattr(all_reduce, "CustomAllreduce", second)
    yield SimpleNamespace(
        device_communicator=communicator(Buffers(2.0)),
        cpu_group=torch.distributed.group.WORLD,
        world_size=1,
        made=made,
    )
    torch.distributed.destroy_process_group()


def test_each_micro_batch_reduces_in_buffers_of_its_own(group: Any) -> None:
    each = install(config(), group, max_rows=8)
    assert each is not None
    reduce = group.device_communicator.all_reduce
    assert reduce(ROWS)[0, 0] == 2
    with each.of(1):
        assert reduce(ROWS.bfloat16())[0, 0] == 3
        with pytest.raises(RuntimeError, match=r"\(9, 16\).*--token-parallel-overlap-from 0"):
            reduce(torch.ones(9, 16, dtype=torch.bfloat16))
    with each.of(0):
        assert reduce(ROWS)[0, 0] == 2
    assert reduce(ROWS)[0, 0] == 2, "outside a graph of two micro-batches it is vLLM's own"


def test_what_graphs_reduce_is_registered_for_both_when_vllm_ends_its_captures(group: Any) -> None:
    own = group.device_communicator.ca_comm
    each = install(config(), group, max_rows=8)
    assert each is not None
    with group.device_communicator.ca_comm.capture():
        with each.of(1):
            second = each._current
        assert own.captures == second.captures == ["begun"]
    assert own.captures == second.captures == ["begun", "registered"]
    assert group.made[0]["register_graph_buffers"]


def test_reductions_that_vllm_would_prefer_are_put_aside(group: Any) -> None:
    group.device_communicator.fi_ar_comm = SimpleNamespace(disabled=False, should_use_fi_ar=lambda rows: True)
    install(config(), group, max_rows=8)
    assert group.device_communicator.all_reduce(ROWS)[0, 0] == 2


def test_without_buffers_of_its_own_there_is_one_micro_batch_and_the_log_says_why(
    group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    monkeypatch.setattr(all_reduce.logger, "warning", lambda text, *args: warned.append(text % args))
    own = group.device_communicator.ca_comm
    assert install(config(fused=True), group, max_rows=8) is None
    assert group.device_communicator.ca_comm is own
    assert "fuse_allreduce_rms" in warned[0]
    own.disabled = True
    assert install(config(), group, max_rows=8) is None
    assert "--disable-custom-all-reduce" in warned[1]
