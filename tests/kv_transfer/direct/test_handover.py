"""KV between two real connectors, both halves of each, over the direct path and others; only the GPU is played."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

from bench.transfer import side as bench_side
from bench.transfer.side import Side, SideJob
from kv_transfer import path
from kv_transfer.direct import driver
from kv_transfer.direct import offer as offer_module
from kv_transfer.direct import path as direct_path
from kv_transfer.direct.agent import DirectRead
from kv_transfer.packed import path as packed_path
from tests.kv_transfer.direct.conftest import HostMemory, HostTransfer

TOKENS, BLOCK_SIZE, NUM_BLOCKS = 256, 32, 33
SEEDS = (1, 2)

ports = iter(range(25_600, 26_600))


class Pair:
    """A prefill and a decode side in this process; NIXL still moves what goes through it."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        setting: str,
        prefill: str = "direct",
        decode_block_size: int = BLOCK_SIZE,
    ) -> None:
        extra = {"kv_connector_extra_config": {"kv_transfer_path": setting}}
        monkeypatch.setitem(bench_side.CONNECTORS, "tested", bench_side.CONNECTORS["direct"] | extra)
        self.prefill, self.decode = (
            self._start(monkeypatch, name, role, block_size)
            for name, role, block_size in (
                (prefill, "kv_producer", BLOCK_SIZE),
                ("tested", "kv_consumer", decode_block_size),
            )
        )
        self.prefill.fill(SEEDS[0])
        step = self.decode.step

        def step_both() -> set[str]:  # without its thread, NIXL makes progress when an engine steps
            self.prefill.step()
            return step()

        monkeypatch.setattr(self.decode, "step", step_both)

    def _start(self, monkeypatch: pytest.MonkeyPatch, name: str, role: str, block_size: int) -> Side:
        port = next(ports)
        monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_HOST", "127.0.0.1")
        monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", str(port))
        return Side(SideJob(name, role, "tiny", block_size, NUM_BLOCKS, None, port))

    def hand_over(self, requests: int = 1) -> int:
        """Pulls into scattered blocks; how many blocks of the cache then don't hold what they should."""
        lists = []
        for _ in range(2):
            pool, count = random.sample(range(1, NUM_BLOCKS), NUM_BLOCKS - 1), TOKENS // BLOCK_SIZE
            lists.append([pool[i * count : (i + 1) * count] for i in range(requests)])
        wrong = self.decode.pull(TOKENS, self.prefill.offer(TOKENS, lists[0]), lists[1], SEEDS).wrong_blocks
        assert wrong is not None
        return wrong

    def is_prefill_free(self) -> bool:
        """Whether every lease was ended by its reader."""
        deadline = time.monotonic() + 20
        while (keeps := self.prefill._worker.connector_worker._reqs_to_send) and time.monotonic() < deadline:
            self.decode.step()
        return not keeps

    @property
    def paths(self) -> list[str]:
        found: list[str] = self.decode._worker.connector_worker.xfer_stats.data["transfer_path"]
        return found

    def shutdown(self) -> None:
        for side in (self.decode, self.prefill):
            side.shutdown()


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    yield
    destroy_model_parallel()
    destroy_distributed_environment()


@pytest.fixture
def pair(gpu: HostMemory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def start(*args: Any) -> Pair:
        made.append(Pair(monkeypatch, *args))
        return made[-1]

    yield start
    for one in made:
        one.shutdown()


@pytest.mark.parametrize(("setting", "taken"), [("auto", "direct"), ("direct", "direct"), ("nixl", "nixl")])
def test_every_byte_arrives_and_the_lease_ends(
    pair: Callable[..., Pair], gpu: HostMemory, setting: str, taken: str
) -> None:
    both = pair(setting)
    assert both.hand_over() == 0
    assert both.hand_over(requests=3) == 0
    assert both.paths == [taken] * 4
    assert both.is_prefill_free()
    both.decode._worker.connector_worker._finish_shutdown()
    assert gpu.num_open == 0


def test_larger_blocks_on_the_decode_side_are_filled_as_nixl_fills_them(pair: Callable[..., Pair]) -> None:
    theirs, ours = [5, 30, 2, 17, 9, 11, 12, 3], [8, 1, 20, 13]
    caches = []
    for setting in ("nixl", "direct"):
        both = pair(setting, "direct", 2 * BLOCK_SIZE)
        both.decode.fill(SEEDS[1])
        both.decode.pull(TOKENS, both.prefill.offer(TOKENS, [theirs]), [ours], None)
        assert both.paths == [setting]
        caches.append(both.decode._backing.clone())
    assert caches[0].view(-1).view(torch.int32).equal(caches[1].view(-1).view(torch.int32))


def other_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_path, "boot_id", lambda: "another")


def other_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    real = offer_module.read_offer

    def read(data: bytes) -> Any:
        offer = real(data)
        assert offer is not None
        return dataclasses.replace(offer, probe=bytes(len(offer.probe)))

    monkeypatch.setattr(direct_path, "read_offer", read)


def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(segment: Any) -> int:
        raise driver.DriverError("cuIpcOpenMemHandle_v2: CUDA_ERROR_INVALID_CONTEXT")

    monkeypatch.setattr(driver, "open_segment", refuse)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (other_host, "it is on another host"),
        (other_bytes, "a copy of its probe brought other bytes"),
        (no_memory, "cuIpcOpenMemHandle_v2: CUDA_ERROR_INVALID_CONTEXT"),
    ],
)
def test_what_cannot_go_directly_goes_through_nixl_and_one_line_says_why(
    pair: Callable[..., Pair],
    gpu: HostMemory,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[pytest.MonkeyPatch], None],
    reason: str,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(path.logger, "info", lambda text, *args: said.append(text % args))
    both = pair("auto")
    fault(monkeypatch)
    assert both.hand_over() == 0
    assert both.paths == ["nixl"]
    assert gpu.num_open == 0
    assert len(said) == 1
    assert f"goes through NIXL: not direct, since {reason}; not packed, since it offers no packing" in said[0]


def test_from_another_host_blocks_are_packed(
    pair: Callable[..., Pair], gpu: HostMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = pair("auto", "tested")
    other_host(monkeypatch)
    monkeypatch.setattr(packed_path, "boot_id", lambda: "another")
    assert both.hand_over() == 0
    assert both.paths == ["packed"]
    assert gpu.num_open == 0
    assert both.is_prefill_free()


def test_where_only_the_direct_path_is_allowed_a_peer_without_it_is_none(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = pair("direct")
    other_host(monkeypatch)
    with pytest.raises(RuntimeError, match="pulls failed"):
        both.hand_over()
    assert both.paths == []


def test_a_stock_prefill_engine_is_read_through_nixl(pair: Callable[..., Pair]) -> None:
    both = pair("auto", "stock")
    assert both.hand_over() == 0
    assert both.paths == ["nixl"]
    assert both.is_prefill_free()


def test_memory_that_cannot_be_shared_keeps_nobody_from_starting(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(address: int) -> Any:
        raise driver.DriverError("cuIpcGetMemHandle: CUDA_ERROR_INVALID_VALUE")

    monkeypatch.setattr(driver, "export", refuse)
    both = pair("auto")
    assert both.hand_over() == 0
    assert both.paths == ["nixl"]


def test_the_memory_of_an_engine_that_is_gone_is_let_go(pair: Callable[..., Pair], gpu: HostMemory) -> None:
    """Without that, an engine in its place would find the GPU full."""
    both = pair("auto")
    both.hand_over()
    assert gpu.num_open > 0
    both.prefill._scheduler.shutdown()  # ends its side channel, as its death would
    deadline = time.monotonic() + 20
    while gpu.num_open and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gpu.num_open == 0
    worker = both.decode._worker.connector_worker
    handle = worker.nixl_wrapper.make_prepped_xfer(
        "READ", *_any_page(worker.src_xfer_handles_by_block_size), *_any_page(*worker.dst_xfer_side_handles.values())
    )
    assert not isinstance(handle, DirectRead), "what comes now is NIXL's to refuse"


def test_a_read_that_is_released_early_is_waited_for(pair: Callable[..., Pair]) -> None:
    """Its blocks may have another owner right after."""
    both = pair("auto")
    both.hand_over()
    worker = both.decode._worker.connector_worker
    handle = worker.nixl_wrapper.make_prepped_xfer(
        "READ", *_any_page(worker.src_xfer_handles_by_block_size), *_any_page(*worker.dst_xfer_side_handles.values())
    )
    worker.nixl_wrapper.transfer(handle)
    worker.nixl_wrapper.release_xfer_handle(handle)
    assert handle.transfer.was_waited_for


def test_a_step_with_nothing_to_compute_waits_for_the_copy_and_not_for_long(pair: Callable[..., Pair]) -> None:
    both = pair("auto")
    both.hand_over()
    agent = both.decode._worker.connector_worker._path.agent
    slow = HostTransfer(1, 1)
    agent._under_way.append(slow)
    both.decode.step()
    assert agent._under_way == [] and slow.num_polls == 3
    never = HostTransfer(1, 1)
    never.is_done = lambda: False  # type: ignore[method-assign]
    agent._under_way.append(never)
    begin = time.monotonic()
    both.decode.step()
    assert agent._under_way == [never] and time.monotonic() - begin < 2


def _any_page(handles: dict[int, Any]) -> tuple[Any, list[int]]:
    [handle] = handles.values()
    return handle, [0]


def test_a_wrong_block_would_be_found(pair: Callable[..., Pair]) -> None:
    both = pair("auto")
    both.prefill.fill(SEEDS[0] + 7)
    assert both.hand_over() == TOKENS // BLOCK_SIZE
