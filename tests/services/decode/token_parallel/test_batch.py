from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.request import RequestStatus

from services.decode.token_parallel.batch import Batch
from services.decode.token_parallel.step import RootStep
from tests.services.building import BLOCK_SIZE, MAX_MODEL_LEN, Stepper, request, scheduler, tiny_config
from tknp.common.partition import BlockPartition, RankPlace


@pytest.fixture(scope="module")
def config(llama: Path) -> Any:
    return tiny_config(llama)


def batches(num_blocks: tuple[int, ...], num_groups: int = 1) -> list[Batch]:
    """What every rank of an engine replays."""
    partition = BlockPartition(num_blocks)
    return [
        Batch(RankPlace(rank, partition), [BLOCK_SIZE] * num_groups, MAX_MODEL_LEN, torch.device("cpu"))
        for rank in range(partition.size)
    ]


def check_rank(batch: Batch, plan: Any, scheduled: dict[str, int]) -> int:
    """Compares a rank's metadata with what the scheduler's own tables say, row by row; returns the number of rows."""
    manager = plan.kv_cache_manager
    mine = batch.scheduled_by_rank()[batch.place.rank]
    assert mine == [r for r in scheduled if manager.rank_of(r) == batch.place.rank]
    if not mine:
        return 0
    groups = batch.attention_metadata(mine)
    for group, metadata in enumerate(groups):
        slots: list[int] = []
        seq_lens: list[int] = []
        for row, name in enumerate(mine):
            local = [block - batch.place.base for block in manager.get_block_ids(name)[group]]
            assert all(0 <= block < batch.place.num_blocks for block in local)
            computed = plan.requests[name].num_computed_tokens - scheduled[name]  # vLLM has counted this step already
            positions = range(computed, computed + scheduled[name])
            slots += [local[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in positions]
            seq_lens.append(computed + scheduled[name])
            used = -(-seq_lens[-1] // BLOCK_SIZE)
            assert metadata.block_table_tensor[row, :used].tolist() == local[:used]
        counts = [scheduled[name] for name in mine]
        assert metadata.slot_mapping.tolist() == slots
        assert metadata.seq_lens.tolist() == metadata.seq_lens_cpu_upper_bound.tolist() == seq_lens
        assert metadata.query_start_loc.tolist() == [0, *np.cumsum(counts)]
        assert (metadata.num_reqs, metadata.num_actual_tokens) == (len(mine), sum(counts))
        assert (metadata.max_query_len, metadata.max_seq_len) == (max(counts), max(seq_lens))
        assert metadata.causal is True
        if batch.is_decode():
            rows = batch.decode_rows(mine)
            assert rows.seq_lens.tolist() == seq_lens
            assert rows.slots[group].tolist() == slots
            assert rows.block_tables[group].tolist() == metadata.block_table_tensor.tolist()
    assert batch.is_decode() == (set(scheduled.values()) == {1} and 1 not in batch_lengths(plan, scheduled))
    return sum(counts)


def batch_lengths(plan: Any, scheduled: dict[str, int]) -> set[int]:
    """Tokens of each scheduled request, this step's included."""
    return {plan.requests[name].num_computed_tokens for name in scheduled}


def test_every_rank_s_metadata_is_what_the_scheduler_s_tables_say_over_a_long_run(config: Any) -> None:
    rng = random.Random(11)
    plan = scheduler(config, (14, 17, 12))
    ranks = batches((14, 17, 12))
    moved: dict[str, set[int]] = {}
    resumed: set[str] = set()

    def check(output: Any) -> None:
        resumed.update(output.scheduled_cached_reqs.resumed_req_ids)
        for batch in ranks:
            batch.update(output)
        rows = [check_rank(batch, plan, output.num_scheduled_tokens) for batch in ranks]
        assert sum(rows) == output.total_num_scheduled_tokens
        for name in output.num_scheduled_tokens:
            moved.setdefault(name, set()).add(plan.kv_cache_manager.rank_of(name))

    stepper = Stepper(plan, check)
    for i in range(500):
        if i < 400 and len(plan.requests) < 14:
            start = rng.choice((0, 0, 100 * i))  # some share a prefix
            prompt = range(start, start + rng.randint(1, 150))
            plan.add_request(request(f"r{i}", prompt, max_tokens=rng.randint(1, 200)))
        if rng.random() < 0.05 and plan.requests:
            plan.finish_requests(rng.choice(list(plan.requests)), RequestStatus.FINISHED_ABORTED)
        stepper.step()
    stepper.finish()
    assert resumed, "nobody was preempted, so this run shows too little"
    assert any(len(places) > 1 for places in moved.values()), "nobody came back on another rank"
    stepper.step()  # the last ones' end
    for batch in ranks:
        assert not batch._owner
        assert not batch._num_computed
        assert not batch._tables
        assert not batch._num_blocks
        assert batch.ever_owned <= set(range(batch.place.num_blocks))


def test_sliding_window_groups_have_tables_of_their_own(config: Any) -> None:
    plan = scheduler(config, (40, 50), windows=(None, 64))
    ranks = batches((40, 50), num_groups=2)

    def check(output: Any) -> None:
        for batch in ranks:
            batch.update(output)
            # Positions inside the window only: what lies before was given back.
            mine = batch.scheduled_by_rank()[batch.place.rank]
            for metadata in batch.attention_metadata(mine) if mine else ():
                assert (metadata.slot_mapping >= BLOCK_SIZE).all(), "a row writes into the null block"
                assert (metadata.slot_mapping < batch.place.num_blocks * BLOCK_SIZE).all()

    stepper = Stepper(plan, check)
    for i in range(6):
        plan.add_request(request(f"r{i}", range(100 * i, 100 * i + 150), max_tokens=100))
    stepper.finish()


def scheduled(**counts: int) -> SimpleNamespace:
    """A SchedulerOutput of new requests, named by rank: `a1` lives on rank 1."""
    new = [
        SimpleNamespace(req_id=name, block_ids=([10 * int(name[1]) + i + 1],), num_computed_tokens=0)
        for i, name in enumerate(counts)
    ]
    cached = SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set())
    return SimpleNamespace(
        finished_req_ids=set(),
        preempted_req_ids=None,
        scheduled_new_reqs=new,
        scheduled_cached_reqs=cached,
        num_scheduled_tokens=counts,
    )


def test_the_root_splits_the_runner_s_rows_by_owner() -> None:
    root = batches((10, 10, 10))[0]
    root.update(scheduled(a0=2, b1=3, c0=1, d2=1, e1=1))
    # The model runner has sorted the batch by itself.
    order = ["e1", "d2", "c0", "a0", "b1"]
    starts = np.array([0, 1, 2, 3, 5, 8], np.int32)
    common = SimpleNamespace(query_start_loc_cpu=torch.from_numpy(starts))
    step = RootStep.plan(root, order, common, iter(["l0", "l1"]))
    assert [rows.tolist() for rows in step.rows] == [[3, 4, 2], [5, 6, 7, 0], [1]]
    assert step.local_metadata[0].query_start_loc.tolist() == [0, 2, 3]


def test_a_root_without_rows_has_no_metadata() -> None:
    root = batches((10, 10))[0]
    root.update(scheduled(a1=2))
    common = SimpleNamespace(query_start_loc_cpu=torch.tensor([0, 2], dtype=torch.int32))
    step = RootStep.plan(root, ["a1"], common, iter(()))
    assert [rows.tolist() for rows in step.rows] == [[], [0, 1]]
    assert step.local_metadata == []


def test_a_layer_out_of_order_is_told_before_any_row_is_sent() -> None:
    root = batches((10, 10))[0]
    root.update(scheduled(a0=1))
    common = SimpleNamespace(query_start_loc_cpu=torch.tensor([0, 1], dtype=torch.int32))
    step = RootStep.plan(root, ["a0"], common, iter(["l0", "l1"]))
    step.enter_layer("l0")
    with pytest.raises(RuntimeError, match="layer l2 where the KV workers expect l1"):
        step.enter_layer("l2")
    with pytest.raises(RuntimeError, match="layer l0 where the KV workers expect None"):
        step.enter_layer("l0")
