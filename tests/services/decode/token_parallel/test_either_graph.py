"""With graphs that say that they were replayed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from services.decode.token_parallel import pace
from services.decode.token_parallel.batch import Batch
from services.decode.token_parallel.either_graph import EitherGraph, capturing_both
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

    def capture_model(self, profile_only: bool = False) -> int:
        assert not self._captured
        for size in SIZES:
            parts = self._graphs.sizes.num_micro_batches(size)
            self._captured[Descriptor(size)] = Graph(f"{size} in {parts}", self.replayed)
        return 100


@pytest.fixture
def graphs() -> Graphs:
    return Graphs(SimpleNamespace(max_rows=8, num_steps=0), ["first"])  # type: ignore[arg-type]


@pytest.fixture
def runner(graphs: Graphs) -> Any:
    """With graphs of both kinds from four rows on."""
    made = Runner(graphs)
    with capturing_both(made, graphs, overlap_from=4):
        assert made.capture_model(profile_only=False) == 200, "bytes of both"
    graphs.sizes = replace(graphs.sizes, sizes=SIZES)
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


def test_blocks_are_those_of_each_rank_s_requests() -> None:
    assert batch(5, 31).blocks_by_rank() == [6, 4]
    assert batch(5, 32).blocks_by_rank() == [9, 6], "with the token that the step writes"


def test_each_step_replays_the_graph_that_it_is_divided_for(graphs: Graphs, runner: Any) -> None:
    captured = runner.cudagraph_manager.graphs[Descriptor(8)]
    # Of four blocks each in one: 0.2 s and theirs; in two 0.1 s and the root's, or theirs.
    slow_root = RootPace(0, (4, 8), halved=(0.1, 0.1), whole=(0.2, 0.2))
    fast_root = RootPace(0, (4, 8), halved=(0.3, 0.3), whole=(0.2, 0.2))
    for overlap, parts in ((Overlap(slow_root, 0.01, 2), 2), (Overlap(fast_root, 0.01, 2), 1), (None, 1)):
        graphs.overlap = overlap
        step = graphs.begin_step(batch(8, 15))
        assert step is not None and len(step.micro_batches) == parts and step.rows_each == 8 // parts
        captured.replay()
        assert runner.replayed[-1] == f"8 in {parts}"
    graphs.step = None  # as in a warm-up
    captured.replay()
    assert runner.replayed[-1] == "8 in 1"


def test_where_it_was_said_when_steps_overlap_they_do(graphs: Graphs) -> None:
    graphs.sizes = GraphSizes(SIZES, overlap_from=4)
    step = graphs.begin_step(batch(8, 15))
    assert step is not None and len(step.micro_batches) == 2


def test_graphs_below_the_threshold_are_of_one_kind(graphs: Graphs, runner: Any) -> None:
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
    assert root_pace(graphs.sizes, manager.graphs, 32) == RootPace(32, (4, 8), (0.5, 0.9), (0.4, 0.8))
    # As captured where it was said from when on steps overlap, and that none does.
    for overlap_from, expected in ((8, RootPace(32, (8,), (0.9,))), (None, None)):
        manager.release_graphs()
        graphs.sizes = GraphSizes(SIZES, overlap_from)
        runner.capture_model()
        assert root_pace(graphs.sizes, manager.graphs, 32) == expected
