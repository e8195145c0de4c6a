"""With graphs that say that they were replayed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from services.decode.token_parallel import pace
from services.decode.token_parallel.batch import Batch
from services.decode.token_parallel.either_graph import EitherGraph, capture_halves
from services.decode.token_parallel.graphs import Graphs
from services.decode.token_parallel.micro_batch import GraphSizes
from services.decode.token_parallel.overlap import Overlap, RootPace
from services.decode.token_parallel.pace import root_pace

SIZES = (1, 2, 4, 8)


class Descriptor(int):
    """vLLM's, as a key."""

    @property
    def num_tokens(self) -> int:
        return int(self)


class Graph:
    def __init__(self, name: str, replayed: list[str]) -> None:
        self.replay = lambda: replayed.append(name)


class Runner:
    """Captures as vLLM's: a graph for each size, which may not be there yet."""

    def __init__(self, graphs: Graphs) -> None:
        self.replayed: list[str] = []
        self._graphs = graphs
        self._captured: dict[Any, Graph] = {}
        self.cudagraph_manager: Any = SimpleNamespace(graphs=self._captured, release_graphs=self._captured.clear)

    def capture_model(self) -> None:
        assert not self._captured
        for size in SIZES:
            parts = self._graphs.sizes.num_micro_batches(size)
            self._captured[Descriptor(size)] = Graph(f"{size} in {parts}", self.replayed)


@pytest.fixture
def graphs() -> Graphs:
    return Graphs(SimpleNamespace(max_rows=8, num_steps=0), ["first"])  # type: ignore[arg-type]


@pytest.fixture
def runner(graphs: Graphs) -> Any:
    made = Runner(graphs)
    made.capture_model()
    return made


def batch(num_requests: int, num_computed: int) -> Any:
    """Of decode steps; every other request is the root's."""
    made: Any = object.__new__(Batch)
    names = [f"r{i}" for i in range(num_requests)]
    made.num_scheduled_tokens = dict.fromkeys(names, 1)
    made._num_computed = dict.fromkeys(names, num_computed)
    made._owner = {name: i % 2 for i, name in enumerate(names)}
    made._block_sizes = (16,)
    made.place = SimpleNamespace(partition=SimpleNamespace(size=2))
    return made


def test_rows_and_blocks_are_those_of_all_ranks() -> None:
    assert batch(4, 31).num_rows_and_blocks() == (4, 8)
    assert batch(4, 32).num_rows_and_blocks() == (4, 12), "with the token that the step writes"


def test_each_step_replays_the_graph_that_it_is_divided_for(graphs: Graphs, runner: Any) -> None:
    capture_halves(runner, graphs, overlap_from=4)
    graphs.sizes = GraphSizes(SIZES, graphs.sizes.overlap_from, graphs.sizes.has_whole)
    captured = runner.cudagraph_manager.graphs[Descriptor(8)]
    # In one, 0.1 s and half of the blocks' time; in two, 0.15 s, or half of that and of the blocks' time: 16 blocks of
    # 0.01 s are enough, 8 are not.
    root = RootPace(0, (4, 8), halved=(0.15, 0.15), whole=(0.1, 0.1))
    for overlap, num_computed, parts in (
        (Overlap(root, 0.01, 2), 31, 2),
        (Overlap(root, 0.01, 2), 15, 1),
        (None, 15, 2),
    ):
        graphs.overlap = overlap
        step = graphs.begin_step(batch(8, num_computed))
        assert step is not None and len(step.micro_batches) == parts and step.rows_each == 8 // parts
        captured.replay()
        assert runner.replayed[-1] == f"8 in {parts}"
    graphs.step = None  # as in a dummy run
    captured.replay()
    assert runner.replayed[-1] == "8 in 1"


def test_graphs_below_the_threshold_are_captured_in_one_micro_batch_alone(graphs: Graphs, runner: Any) -> None:
    capture_halves(runner, graphs, overlap_from=4)
    kinds = {int(size): isinstance(graph, EitherGraph) for size, graph in runner.cudagraph_manager.graphs.items()}
    assert kinds == {1: False, 2: False, 4: True, 8: True}
    assert graphs.sizes.has_whole and graphs.sizes.overlap_from == 4


def test_a_root_measures_both_kinds_where_there_are_both(
    graphs: Graphs, runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds_of(replay: Any) -> float:
        replay()
        return {"4 in 1": 0.4, "4 in 2": 0.5, "8 in 1": 0.8, "8 in 2": 0.9}[runner.replayed[-1]]

    monkeypatch.setattr(pace, "seconds_of", seconds_of)
    manager = runner.cudagraph_manager
    assert root_pace(graphs.sizes, manager.graphs, 32) is None
    capture_halves(runner, graphs, overlap_from=4)
    assert root_pace(graphs.sizes, manager.graphs, 32) == RootPace(32, (4, 8), (0.5, 0.9), (0.4, 0.8))
    # As captured where it was said from when on steps overlap.
    manager.release_graphs()
    graphs.sizes = GraphSizes(SIZES, overlap_from=8)
    runner.capture_model()
    assert root_pace(graphs.sizes, manager.graphs, 32) == RootPace(32, (8,), (0.9,))
