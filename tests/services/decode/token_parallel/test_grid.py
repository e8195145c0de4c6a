from __future__ import annotations

from types import SimpleNamespace

import pytest

from services.decode.token_parallel.grid import WorkerGrid
from services.decode.token_parallel.options import TokenParallelOptions


@pytest.mark.parametrize(
    ("weights", "known", "places", "groups"),
    [
        ("root", 2, [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)], [[0, 2, 4], [1, 3, 5]]),
        ("spread", 6, [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)], [[0, 1, 2], [3, 4, 5]]),
    ],
)
def test_every_rank_has_a_worker_of_every_shard(
    weights: str, known: int, places: list[tuple[int, int]], groups: list[list[int]]
) -> None:
    """Two shards, three ranks."""
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=known),
        additional_config=TokenParallelOptions(3, weights=weights).as_config(),
    )
    grid = WorkerGrid.of(config)
    assert (grid.num_shards, grid.num_ranks, grid.num_workers, grid.num_known) == (2, 3, 6, known)
    assert [grid.place(worker) for worker in range(6)] == places
    assert grid.by_shard(range(6)) == groups


def test_one_rank_is_plain_vllm_wherever_its_weights_are() -> None:
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=4),
        additional_config=TokenParallelOptions(1, weights="spread").as_config(),
    )
    assert WorkerGrid.of(config) == WorkerGrid(4, 1)
