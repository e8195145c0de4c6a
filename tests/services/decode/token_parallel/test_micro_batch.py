from __future__ import annotations

import random

from services.decode.token_parallel.micro_batch import GraphSizes, MicroBatch, divide, overlap_threshold


def test_rows_are_laid_out_by_owner() -> None:
    part = MicroBatch((("a", "b"), (), ("c", "d", "e"), ("f",)))
    assert part.num_rows == 6
    assert part.first_rows == (0, 2, 2, 5)


def test_one_micro_batch_is_the_whole_step() -> None:
    assert divide([["a"], ["b", "c"]], 1) == [MicroBatch((("a",), ("b", "c")))]


def test_halves_hold_every_request_once_on_its_rank_and_differ_by_one_row_at_most() -> None:
    rng = random.Random(3)
    for _ in range(500):
        ranks = [[f"{rank}.{i}" for i in range(rng.randint(0, 7))] for rank in range(rng.randint(1, 5))]
        first, second = divide(ranks, 2)
        assert [[*a, *b] for a, b in zip(first.requests, second.requests, strict=True)] == ranks
        assert abs(first.num_rows - second.num_rows) <= 1
        for a, b in zip(first.requests, second.requests, strict=True):
            assert abs(len(a) - len(b)) <= 1


def test_a_step_takes_the_smallest_graph_that_holds_it() -> None:
    sizes = GraphSizes((1, 2, 4, 8, 16))
    assert [sizes.size_for(n) for n in (0, 1, 3, 16, 17)] == [None, 1, 4, 16, None]
    assert GraphSizes().size_for(1) is None


def test_two_micro_batches_from_the_threshold_on_and_only_of_even_sizes() -> None:
    sizes = GraphSizes((1, 2, 4, 8, 9), overlap_from=4)
    assert [sizes.num_micro_batches(size) for size in sizes.sizes] == [1, 1, 2, 2, 1]
    assert GraphSizes((8,)).num_micro_batches(8) == 1


def test_a_kv_worker_has_a_graph_for_any_share_of_any_step() -> None:
    sizes = GraphSizes((1, 2, 4, 8, 16, 32, 64, 300, 600), overlap_from=64)
    shapes = sizes.worker_shapes()
    for size in sizes.sizes:
        parts = sizes.num_micro_batches(size)
        for rows in range(1, size // parts + 1):
            assert any(limit >= rows and p == parts for limit, p in shapes)
    assert max(limit for limit, parts in shapes if parts == 1) == 32
    assert max(limit for limit, parts in shapes if parts == 2) == 300
    assert len(shapes) == len(set(shapes))


def test_where_both_kinds_are_captured_a_kv_worker_has_both() -> None:
    shapes = GraphSizes((1, 2, 4, 8, 16, 32, 64, 300, 600), overlap_from=64, has_whole=True).worker_shapes()
    assert max(limit for limit, parts in shapes if parts == 1) == 600
    assert max(limit for limit, parts in shapes if parts == 2) == 300


def test_overlap_pays_where_a_rank_s_kv_cache_is_larger_than_the_weights() -> None:
    # 8B shape, 8,192 tokens, four ranks: a row has 1.07 GB of KV cache, and the weights have 16 GB.
    assert overlap_threshold(16_000_000_000, 131_072, 8192, 4) == 60
    assert overlap_threshold(1, 131_072, 8192, 4) == 2
