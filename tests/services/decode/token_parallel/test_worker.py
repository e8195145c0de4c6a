"""What a root does around vLLM's own start, on a worker that is not started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import envs

from services.decode.token_parallel.graphs import Graphs
from services.decode.token_parallel.micro_batch import GraphSizes
from services.decode.token_parallel.worker import ModelWorker, RootWorker
from tests.services.building import tiny_config


@pytest.fixture
def root(llama: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Whose steps can overlap from eight rows on; `captured` are the sizes that its runner was asked to capture for."""
    made: Any = object.__new__(RootWorker)
    made.vllm_config = tiny_config(llama)
    graphs = Graphs(SimpleNamespace(max_rows=8), ["first"])  # type: ignore[arg-type]
    graphs.sizes = GraphSizes(overlap_from=8)
    made.context = SimpleNamespace(graphs=graphs)
    made.captured = []
    manager = SimpleNamespace(graphs={}, release_graphs=lambda: None)
    made.model_runner = SimpleNamespace(
        cudagraph_manager=manager, capture_model=lambda: made.captured.append(graphs.sizes) or 1
    )
    made._group = SimpleNamespace(broadcast_object=lambda sizes, src: setattr(made, "told", sizes))
    made.cudagraph_memory_estimate = 300
    monkeypatch.setattr(ModelWorker, "determine_available_memory", lambda _: 1000)
    monkeypatch.setattr(ModelWorker, "compile_or_warm_up_model", lambda worker: worker.model_runner.capture_model())
    monkeypatch.setattr(envs, "VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS", True, raising=False)
    return made


def say(root: Any, overlap_from: int) -> None:
    root.vllm_config.additional_config["token_parallel"]["overlap_from"] = overlap_from


def test_graphs_of_both_kinds_are_captured_while_vllm_captures_its_own(root: Any) -> None:
    own = root.model_runner.capture_model
    assert root.compile_or_warm_up_model() == 2, "bytes of both"
    both = GraphSizes(overlap_from=8, has_whole=True)
    assert root.captured == [GraphSizes(), both]
    assert root.told == both, "KV workers capture both, too"
    assert root.model_runner.capture_model is own


def test_where_it_was_said_when_steps_overlap_there_is_one_kind(root: Any) -> None:
    say(root, 8)
    assert root.compile_or_warm_up_model() == 1
    assert root.captured == [GraphSizes(overlap_from=8)]


def test_memory_is_left_for_the_second_kind(root: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert root.determine_available_memory() == 700
    monkeypatch.setattr(envs, "VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS", False, raising=False)
    assert root.determine_available_memory() == 1000, "as vLLM, which was told to leave none"


def test_no_memory_is_left_where_there_is_one_kind(root: Any) -> None:
    say(root, 8)
    assert root.determine_available_memory() == 1000
