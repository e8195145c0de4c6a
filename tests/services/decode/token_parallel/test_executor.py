"""The executor's arithmetic, on an executor that starts no worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec

from services.decode.token_parallel.executor import TokenParallelExecutor
from services.decode.token_parallel.grid import WorkerGrid
from services.decode.token_parallel.options import TokenParallelOptions
from services.decode.token_parallel.overlap import Overlap, RootPace, get_overlap, set_overlap
from tests.services.building import BLOCK_SIZE, tiny_config
from tknp.common.partition import get_partition

NUM_LAYERS = 4
BLOCK_BYTES = NUM_LAYERS * BLOCK_SIZE * 2 * 2 * 32 * 4


@pytest.fixture
def config(llama: Path) -> Any:
    config = tiny_config(llama, 2)
    config.cache_config.kv_cache_layout = "LBHNC"
    return config


def executor(config: Any, *available: int, blocks_per_rank: tuple[int, ...] | None = None) -> Any:
    """An executor whose ranks have `available` bytes (one tensor-parallel worker each)."""
    made: Any = object.__new__(TokenParallelExecutor)
    made.vllm_config, made.cache_config, made.parallel_config = config, config.cache_config, config.parallel_config
    made._options = TokenParallelOptions(len(available), blocks_per_rank)
    made._grid = WorkerGrid(1, len(available))
    made._available = [list(available)]
    return made


def planned(config: Any, num_blocks: int) -> Any:
    """The engine core's plan for the sum of the ranks."""
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=2, head_size=32, dtype=torch.float32)
    groups = [KVCacheGroupSpec([f"layers.{i}" for i in range(NUM_LAYERS)], spec)]
    plan = get_kv_cache_config_from_groups(config, groups, num_blocks * BLOCK_BYTES)
    assert plan.num_blocks == num_blocks
    return plan


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The plans that workers would get."""
    plans: list[Any] = []
    monkeypatch.setattr(MultiprocExecutor, "initialize_from_config", lambda _, configs: plans.extend(configs))
    return plans


def test_every_rank_gets_what_its_memory_holds(config: Any, sent: list[Any]) -> None:
    made = executor(config, 30 * BLOCK_BYTES + 5, 50 * BLOCK_BYTES + BLOCK_BYTES - 1)
    made.initialize_from_config([planned(config, 80)])
    assert [plan.num_blocks for plan in sent] == [30, 50]


def test_spread_weights_every_worker_is_told_its_rank_s_blocks(config: Any, sent: list[Any], monkeypatch: Any) -> None:
    made = executor(config, 30 * BLOCK_BYTES, 50 * BLOCK_BYTES)
    made._grid = WorkerGrid(num_shards=2, num_ranks=2, is_spread=True)
    # Workers 0 and 1 have the first KV head, 2 and 3 the second one; of a rank's two the one with less room decides.
    rooms = [30, 50, 40, 45]
    monkeypatch.setattr(MultiprocExecutor, "determine_available_memory", lambda _: [n * BLOCK_BYTES for n in rooms])
    assert made.determine_available_memory() == [n * BLOCK_BYTES for n in (80, 80, 85, 85)]
    made.initialize_from_config([planned(config, 80)] * 4)
    assert [plan.num_blocks for plan in sent] == [30, 45, 30, 45]
    partition = get_partition()
    assert partition is not None and (partition.num_blocks, partition.num_shards) == ((30, 45), 2)


ROOT = RootPace(num_layers=4, rows=(8,), halved=(0.006,))


@pytest.mark.parametrize(
    ("root", "workers", "block_seconds"),
    [(ROOT, [0.002, 0.004], 0.003), (None, [0.002, None], None), (ROOT, [None, 0.0], None)],
)
def test_all_workers_and_the_scheduler_are_told_when_steps_overlap(
    config: Any, monkeypatch: Any, root: Any, workers: list[Any], block_seconds: float | None
) -> None:
    made = executor(config, *[50 * BLOCK_BYTES] * 3)
    told: list[Any] = []

    def collective_rpc(_: Any, name: str, args: Any = ()) -> list[Any]:
        if name == "token_parallel_pace":
            return [root, *workers]
        assert name == "set_token_parallel_overlap"
        told.extend(args)
        return []

    monkeypatch.setattr(MultiprocExecutor, "compile_or_warm_up_model", lambda _: None)
    monkeypatch.setattr(MultiprocExecutor, "collective_rpc", collective_rpc)
    made.compile_or_warm_up_model()
    expected = None if block_seconds is None else Overlap(ROOT, block_seconds, num_ranks=3)
    assert get_overlap() == expected
    assert told == [expected] * (expected is not None)
    set_overlap(None)


def test_an_override_of_the_number_of_blocks_is_the_sum(config: Any, sent: list[Any]) -> None:
    config.cache_config.num_gpu_blocks_override = 51
    executor(config, 100 * BLOCK_BYTES, 100 * BLOCK_BYTES).initialize_from_config([planned(config, 51)])
    assert [plan.num_blocks for plan in sent] == [26, 25]


def test_block_counts_that_were_asked_for_are_taken(config: Any, sent: list[Any]) -> None:
    made = executor(config, 30 * BLOCK_BYTES, 50 * BLOCK_BYTES, blocks_per_rank=(20, 40))
    made.initialize_from_config([planned(config, 80)])
    assert [plan.num_blocks for plan in sent] == [20, 40]


@pytest.mark.parametrize("wanted", [(31, 40), (20, 51), (1, 40)])
def test_block_counts_that_do_not_fit_are_refused(config: Any, sent: list[Any], wanted: tuple[int, int]) -> None:
    made = executor(config, 30 * BLOCK_BYTES, 50 * BLOCK_BYTES, blocks_per_rank=wanted)
    with pytest.raises(ValueError, match=r"their memory holds \[30, 50\]"):
        made.initialize_from_config([planned(config, 80)])


@pytest.mark.parametrize(("num_blocks", "fits"), [(17, True), (16, False)])
def test_the_longest_request_must_fit_on_one_rank(config: Any, sent: list[Any], num_blocks: int, fits: bool) -> None:
    # 512 tokens are 16 blocks, and the null block is nobody's.
    made = executor(config, 10 * BLOCK_BYTES, num_blocks * BLOCK_BYTES)
    if fits:
        made.initialize_from_config([planned(config, 10 + num_blocks)])
    else:
        with pytest.raises(ValueError, match=r"--max-model-len is 512 tokens.*the largest holds about"):
            made.initialize_from_config([planned(config, 10 + num_blocks)])


@pytest.mark.parametrize("left", [0, -3])
def test_a_rank_without_room_is_named_at_start(config: Any, sent: list[Any], left: int) -> None:
    made = executor(config, 60 * BLOCK_BYTES, left * BLOCK_BYTES)
    with pytest.raises(ValueError, match="rank"):
        made.initialize_from_config([planned(config, 60)])


def test_a_worker_is_described_by_its_two_ranks(config: Any) -> None:
    made = executor(config, 1, 1)
    made._grid = WorkerGrid(num_shards=2, num_ranks=3)
    assert made._describe(1) == "root of token-parallel rank 0, tensor-parallel rank 1"
    assert made._describe(4) == "KV worker of token-parallel rank 2, tensor-parallel rank 0"


def test_the_memory_of_a_root_worker_is_that_of_its_token_parallel_group(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = executor(config, 1, 1)
    made._grid = WorkerGrid(num_shards=2, num_ranks=3)
    monkeypatch.setattr(MultiprocExecutor, "determine_available_memory", lambda _: [1, 2, 10, 20, 100, 200])
    assert made.determine_available_memory() == [111, 222]
    assert made._available == [[1, 10, 100], [2, 20, 200]]
