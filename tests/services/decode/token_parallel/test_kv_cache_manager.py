from __future__ import annotations

import random
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from services.decode.token_parallel.kv_cache_manager import PartitionedKVCacheManager
from services.decode.token_parallel.overlap import Overlap, RootPace, set_overlap
from tests.services.building import BLOCK_SIZE, partitioned_manager, request


def admit(manager: PartitionedKVCacheManager, req: Any, num_tokens: int | None = None) -> Any:
    """Looks a waiting request up and gives it slots for `num_tokens` (all of its prompt), as vLLM's schedule does."""
    hit, num_hit, _ = manager.get_computed_blocks(req)
    num_new = (num_tokens or req.num_tokens) - num_hit
    blocks = manager.allocate_slots(req, num_new, num_new_computed_tokens=num_hit, new_computed_blocks=hit)
    if blocks is not None:
        req.num_computed_tokens = num_hit + num_new
        req.status = RequestStatus.RUNNING
    return blocks


def grow(manager: PartitionedKVCacheManager, req: Any) -> bool:
    """One more token; whether there was room for it."""
    req.append_output_token_ids(len(req.all_token_ids))
    if manager.allocate_slots(req, 1) is None:
        return False
    req.num_computed_tokens += 1
    return True


def ids(manager: PartitionedKVCacheManager, req: Any) -> list[int]:
    return [block for group in manager.get_block_ids(req.request_id) for block in group]


def test_every_rank_hands_out_its_own_global_ids_and_never_its_null_block() -> None:
    manager = partitioned_manager((5, 7, 4))
    owned: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    for i in range(20):
        req = request(f"r{i}", range(1000 * i, 1000 * i + BLOCK_SIZE), max_tokens=1)
        if admit(manager, req) is None:
            break
        rank = manager.rank_of(req.request_id)
        assert rank is not None
        owned[rank].update(ids(manager, req))
    assert owned == {0: {1, 2, 3, 4}, 1: {6, 7, 8, 9, 10, 11}, 2: {13, 14, 15}}
    assert manager.free_blocks_per_rank() == [0, 0, 0]
    assert manager.usage == 1.0


def test_all_blocks_of_a_request_lie_on_its_rank_in_every_group() -> None:
    manager = partitioned_manager((30, 30), windows=(None, 64))
    req = request("r", range(300))
    admit(manager, req)
    assert manager.partition.rank_of_all(ids(manager, req)) == manager.rank_of("r") == 1


def test_blocks_that_a_window_left_behind_become_the_rank_s_own_null_block() -> None:
    manager = partitioned_manager((30, 30), windows=(64,))
    req = request("r", range(300), max_tokens=100)
    admit(manager, req)
    grow(manager, req)
    assert ids(manager, req)[0] == 30  # the null block of rank 1
    assert manager.partition.rank_of_all(ids(manager, req)) == 1


def test_a_freed_request_gives_its_blocks_back_to_its_rank() -> None:
    manager = partitioned_manager((9, 9))
    first, second = request("a", range(100)), request("b", range(500, 600))
    admit(manager, first)
    admit(manager, second)
    assert (manager.rank_of("a"), manager.rank_of("b")) == (1, 0)
    assert manager.requests_per_rank() == [1, 1]
    manager.free(first)
    assert manager.free_blocks_per_rank() == [4, 8]
    assert manager.rank_of("a") is None
    assert manager.requests_per_rank() == [1, 0]


def test_a_root_whose_steps_overlap_is_given_less() -> None:
    # From two requests on, its products take as long as attention to nine blocks.
    set_overlap(Overlap(RootPace(4, rows=(2, 8), halved=(0.09, 0.09)), block_seconds=0.01, num_ranks=2))
    try:
        manager = partitioned_manager((30, 30))
        for i in range(4):
            admit(manager, request(f"r{i}", range(1000 * i, 1000 * i + 100)))
        assert [manager.rank_of(f"r{i}") for i in range(4)] == [1, 1, 1, 0], "four blocks each"
    finally:
        set_overlap(None)


def test_blocks_popped_for_a_later_free_go_back_through_any_pool() -> None:
    manager = partitioned_manager((9, 9))
    req = request("a", range(100))
    admit(manager, req)
    blocks = manager.pop_blocks_for_free(req)
    assert len(blocks) == 4
    assert manager.free_blocks_per_rank() == [8, 4]
    assert (manager.rank_of("a"), manager.requests_per_rank()) == (None, [0, 0])
    # The scheduler frees what it deferred through `kv_cache_manager.block_pool`, which is rank 0's.
    manager.block_pool.free_blocks(reversed(blocks))
    assert manager.free_blocks_per_rank() == [8, 8]
    assert manager.pop_blocks_for_free(req) == []


def test_a_prefix_hit_draws_a_request_to_the_rank_that_has_it() -> None:
    manager = partitioned_manager((40, 40, 40))
    first = request("a", range(100))
    admit(manager, first)
    rank = manager.rank_of("a")
    shared = ids(manager, first)[:3]
    manager.free(first)
    again = request("b", range(100))
    hit, num_hit, _ = manager.get_computed_blocks(again)
    assert num_hit == 3 * BLOCK_SIZE
    assert manager.rank_of("b") == manager.placing_rank == rank
    assert [block.block_id for block in hit.blocks[0]] == shared


def test_a_hit_on_another_rank_is_no_hit() -> None:
    manager = partitioned_manager((5, 40))
    first = request("a", range(100), max_tokens=1)
    admit(manager, first)
    assert manager.rank_of("a") == 1
    crowd = request("b", range(5000, 5000 + 35 * BLOCK_SIZE - 1), max_tokens=1)
    admit(manager, crowd)
    assert manager.rank_of("b") == 1
    again = request("c", range(70), max_tokens=1)
    _, num_hit, _ = manager.get_computed_blocks(again)
    assert (manager.rank_of("c"), num_hit) == (0, 0)
    most_of_it = request("d", range(100), max_tokens=1)
    _, num_hit, _ = manager.get_computed_blocks(most_of_it)
    assert (manager.rank_of("d"), num_hit) == (1, 96)


def test_the_rank_without_room_for_a_running_request_is_named_until_somebody_gets_a_block() -> None:
    manager = partitioned_manager((3, 9))
    req = request("a", range(BLOCK_SIZE), max_tokens=200)
    admit(manager, req)
    crowd = request("b", range(900, 900 + 7 * BLOCK_SIZE), max_tokens=1)
    admit(manager, crowd)
    assert manager.rank_of("a") == manager.rank_of("b") == 1
    assert not grow(manager, req)
    assert manager.starved_rank == 1
    manager.free(crowd)
    assert manager.allocate_slots(req, 1) is not None
    assert {manager.starved_rank} == {None}


def test_a_waiting_request_without_room_starves_nobody() -> None:
    manager = partitioned_manager((3, 3))
    assert admit(manager, request("a", range(10 * BLOCK_SIZE), max_tokens=1)) is None
    assert manager.starved_rank is None


def test_a_new_step_forgets_who_starved() -> None:
    manager = partitioned_manager((3, 3))
    manager.starved_rank = 1
    manager.new_step_starts()
    assert manager.starved_rank is None


def test_a_place_is_tentative_until_slots_are_given() -> None:
    manager = partitioned_manager((9, 9))
    req = request("a", range(40))
    manager.get_computed_blocks(req)
    admit(manager, request("b", range(500, 700)))
    manager.get_computed_blocks(req)
    assert manager.requests_per_rank() == [1, 1]
    manager.free(req)  # aborted while it waited
    assert sum(manager.requests_per_rank()) == 1
    assert manager._expected_blocks.keys() == manager._owner.keys() == {"b"}


def test_a_request_that_holds_blocks_stays_on_its_rank_when_it_is_looked_up_again() -> None:
    manager = partitioned_manager((9, 9))
    pulled = request("pulled", [7])
    admit(manager, pulled)
    assert manager.rank_of("pulled") == 1
    pulled.num_computed_tokens = 0  # as after a pull of one token: the last prompt token is computed here
    crowd = [request(f"r{i}", range(100 * i, 100 * i + 90)) for i in (1, 2)]
    admit(manager, crowd[0])
    admit(manager, crowd[1])
    manager.free(crowd[0])
    assert manager.requests_per_rank() == [0, 2], "rank 0 is the one that a new request would get"

    admit(manager, pulled)
    assert (manager.rank_of("pulled"), manager.placing_rank) == (1, 1)
    for req in (pulled, crowd[1]):
        manager.free(req)
    assert manager.free_blocks_per_rank() == [8, 8]


def test_evicted_blocks_are_no_hit_any_more_on_their_rank_only() -> None:
    manager = partitioned_manager((20, 20))
    one, two = request("a", range(100)), request("b", range(500, 600))
    admit(manager, one)
    admit(manager, two)
    evicted = ids(manager, one)
    manager.free(one)
    manager.free(two)
    manager.evict_blocks(set(evicted))
    assert manager.get_computed_blocks(request("c", range(100)))[1] == 0
    assert manager.get_computed_blocks(request("d", range(500, 600)))[1] == 3 * BLOCK_SIZE


def test_a_reset_concerns_every_rank_also_when_one_refuses() -> None:
    manager = partitioned_manager((20, 20))
    one, two = request("a", range(100)), request("b", range(500, 600))
    admit(manager, one)
    admit(manager, two)
    assert (manager.rank_of("a"), manager.rank_of("b")) == (1, 0)
    manager.free(one)
    assert not manager.reset_prefix_cache()
    assert manager.get_computed_blocks(request("c", range(100)))[1] == 0
    manager.free(two)
    assert manager.reset_prefix_cache()


def test_blocks_to_zero_are_collected_from_all_ranks() -> None:
    manager = partitioned_manager((9, 9))
    for single in (m for rank in manager.managers for m in rank.coordinator.single_type_managers):
        single._record_new_block_ids = True  # as vLLM does for caches of mixed precision
    requests = [request("a", range(100)), request("b", range(500, 600))]
    expected: list[int] = []
    for req in requests:
        admit(manager, req)
        expected += ids(manager, req)
    assert sorted(manager.take_new_block_ids()) == sorted(expected)
    manager.record_blocks_for_zeroing("b", BLOCK_SIZE)
    assert manager.take_new_block_ids() == ids(manager, requests[1])[1:]
    assert manager.take_new_block_ids() == []


def test_questions_about_a_request_that_was_never_placed_are_answered() -> None:
    manager = partitioned_manager((9, 9))
    req = request("a", range(100))
    assert manager.get_block_ids_for_computed_tokens("a", 0) == ([],)
    manager.remove_skipped_blocks(request_id="a", processed_computed_tokens=0, num_prompt_tokens=100)
    assert manager.estimate_cached_tokens(req) == 0
    manager.free(req)


def test_prefix_cache_statistics_are_the_engine_s() -> None:
    manager = partitioned_manager((20, 20))
    for i, rank in ((0, 1), (1, 0)):
        req = request(f"r{i}", range(1000 * i, 1000 * i + 100))
        admit(manager, req)
        assert manager.rank_of(req.request_id) == rank
        manager.record_prefix_cache_stats(req, 32)
    stats = manager.make_prefix_cache_stats()
    assert (stats.requests, stats.queries, stats.hits) == (2, 200, 64)


@pytest.mark.parametrize("windows", [(None,), (None, 64), (64,)])
def test_a_long_random_walk_ends_with_every_block_of_every_rank_free(windows: tuple[int | None, ...]) -> None:
    rng = random.Random(len(windows))
    manager = partitioned_manager((17, 31, 24), windows)
    live: dict[str, Any] = {}
    num_preempted = 0
    for step in range(1500):
        manager.new_step_starts()
        roll = rng.random()
        if roll < 0.4 or not live:
            start = rng.choice((0, 0, 1000, 2000, 100 * step))
            req = request(f"r{step}", range(start, start + rng.randint(1, 200)), max_tokens=rng.randint(1, 150))
            if admit(manager, req) is not None:
                live[req.request_id] = req
            else:
                manager.free(req)
        elif roll < 0.5:
            manager.free(live.pop(rng.choice(list(live))))
        else:
            req = live[rng.choice(list(live))]
            if not grow(manager, req):
                starved = manager.starved_rank
                assert starved == manager.rank_of(req.request_id)
                victim = rng.choice([r for r in live if manager.rank_of(r) == starved])
                manager.free(live.pop(victim))
                num_preempted += 1
        used: list[int] = []
        for req in live.values():
            blocks = [b for b in ids(manager, req) if b not in manager.partition.bases]
            assert manager.partition.rank_of_all(blocks) in (None, manager.rank_of(req.request_id))
            used += blocks
        assert manager.requests_per_rank() == [
            sum(manager.rank_of(r) == rank for r in live) for rank in range(manager.partition.size)
        ]
        # Shared prefixes are the only blocks that two requests hold.
        num_free = sum(manager.free_blocks_per_rank())
        assert manager.partition.total - manager.partition.size - num_free == len(set(used))
    assert num_preempted > 10
    for req in live.values():
        manager.free(req)
    assert manager.free_blocks_per_rank() == [16, 30, 23]
    assert manager.usage == 0.0
    assert not manager._owner
    assert not manager._expected_blocks
