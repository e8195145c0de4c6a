from __future__ import annotations

import random
from dataclasses import replace

from services.decode.token_parallel.placement import MAX_SPREAD, RankState, choose_rank

EMPTY = RankState(
    num_blocks=100, num_free_blocks=100, expected_blocks=0, num_requests=0, num_hit_tokens=0, num_needed_blocks=2
)


def test_the_longest_hit_wins_while_the_loads_are_balanced() -> None:
    ranks = [replace(EMPTY, num_hit_tokens=64, expected_blocks=20), replace(EMPTY, num_hit_tokens=32), EMPTY]
    assert choose_rank(ranks, 10) == 0


def test_balance_counts_more_than_a_hit_once_the_loads_differ_too_much() -> None:
    busy = int(100 * MAX_SPREAD) + 1
    ranks = [replace(EMPTY, num_hit_tokens=64, expected_blocks=busy), EMPTY]
    assert choose_rank(ranks, 10) == 1


def test_load_is_work_not_a_share_of_the_rank_s_room() -> None:
    ranks = [replace(EMPTY, expected_blocks=10), replace(EMPTY, num_blocks=1000, expected_blocks=50)]
    assert choose_rank(ranks, 10) == 0


def test_other_work_counts_as_load() -> None:
    ranks = [replace(EMPTY, expected_blocks=10, other_work=50), replace(EMPTY, expected_blocks=55)]
    assert choose_rank(ranks, 10) == 1


def test_a_rank_that_is_expected_to_run_full_comes_after_one_with_more_work() -> None:
    ranks = [replace(EMPTY, expected_blocks=99), replace(EMPTY, num_blocks=1000, expected_blocks=150)]
    assert choose_rank(ranks, 10) == 1


def test_a_rank_where_the_request_fits_now_comes_before_a_hit_and_before_a_low_load() -> None:
    full = replace(EMPTY, num_free_blocks=1, num_hit_tokens=64)
    assert choose_rank([full, replace(EMPTY, expected_blocks=15)], 10) == 1


def test_of_equal_loads_the_rank_with_fewer_requests_wins() -> None:
    assert choose_rank([EMPTY, EMPTY, replace(EMPTY, num_requests=1)], 10) == 1


def test_a_tie_spares_the_root() -> None:
    assert choose_rank([EMPTY, EMPTY, EMPTY], 10) == 2


def test_a_rank_that_the_request_could_outgrow_is_out_whatever_speaks_for_it() -> None:
    small = replace(EMPTY, num_blocks=9, num_free_blocks=9, num_hit_tokens=64)
    assert choose_rank([replace(EMPTY, num_free_blocks=0, expected_blocks=90), small], 10) == 0


def test_a_rank_that_is_just_large_enough_is_in() -> None:
    exact = replace(EMPTY, num_blocks=10, num_free_blocks=10)
    assert choose_rank([replace(EMPTY, num_free_blocks=0), exact], 10) == 1


def test_if_the_bound_excludes_all_the_largest_rank_takes_the_request() -> None:
    ranks = [replace(EMPTY, num_blocks=5), replace(EMPTY, num_blocks=9), replace(EMPTY, num_blocks=7)]
    assert choose_rank(ranks, 10) == 1


def test_if_the_bound_excludes_all_equal_ranks_share_the_requests() -> None:
    ranks = [replace(EMPTY, expected_blocks=90, num_free_blocks=10, num_requests=9), EMPTY]
    assert choose_rank(ranks, 101) == 1


def test_what_is_all_there_but_its_last_blocks_goes_there_whatever_the_load() -> None:
    """As a request that has KV cache kept for a prefill engine; elsewhere it would compute all of it."""
    there = replace(EMPTY, expected_blocks=90, num_hit_tokens=40 * 16, num_hit_blocks=40, num_needed_blocks=1)
    elsewhere = replace(EMPTY, num_needed_blocks=41)
    assert choose_rank([there, elsewhere], 41) == 0
    assert choose_rank([there, elsewhere], 60) == 1, "one that grows is work for the steps to come"
    assert choose_rank([replace(there, num_free_blocks=0), elsewhere], 41) == 1, "it would hold up all that wait"


def any_rank(rng: random.Random) -> RankState:
    num_blocks = rng.randint(1, 50)
    return RankState(
        num_blocks=num_blocks,
        num_free_blocks=rng.randint(0, num_blocks),
        expected_blocks=rng.randint(0, 2 * num_blocks),
        num_requests=rng.randint(0, 5),
        num_hit_tokens=rng.choice([0, 0, 32, 64]),
        num_needed_blocks=rng.randint(1, 10),
        other_work=rng.choice([0, 0, 20]),
    )


def test_properties_of_any_choice() -> None:
    rng = random.Random(7)
    for _ in range(3000):
        ranks = [any_rank(rng) for _ in range(rng.randint(1, 5))]
        longest = rng.randint(1, 60)
        chosen = choose_rank(ranks, longest)
        capable = [r for r in ranks if r.num_blocks >= longest]
        if not capable:
            assert ranks[chosen].num_blocks == max(r.num_blocks for r in ranks)
            continue
        assert ranks[chosen] in capable
        fitting = [r for r in capable if r.num_free_blocks >= r.num_needed_blocks]
        assert not fitting or ranks[chosen] in fitting
        equals = fitting or capable
        equals = [r for r in equals if r.has_room] or equals
        loads = [r.load for r in capable]
        if max(loads) - min(loads) > MAX_SPREAD * max(r.num_blocks for r in capable):
            assert ranks[chosen].load == min(r.load for r in equals)
        else:
            assert ranks[chosen].num_hit_tokens == max(r.num_hit_tokens for r in equals)
