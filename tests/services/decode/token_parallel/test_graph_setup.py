from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from services.decode.token_parallel import all_reduce, graph_setup
from services.decode.token_parallel.graph_setup import leave_out_fusion, make_graph_model
from services.decode.token_parallel.graphs import Graphs
from tests.services.building import tiny_config


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    texts: list[str] = []
    monkeypatch.setattr(all_reduce.logger, "warning", lambda text, *args: texts.append(text % args))
    # Its stream needs a GPU.
    monkeypatch.setattr(graph_setup, "GraphModel", lambda model, graphs, all_reduces: all_reduces)
    return texts


def overlap_of(config: Any) -> int | None:
    """Rows from which the graphs of such an engine hold two micro-batches."""
    config.additional_config["token_parallel"]["overlap_from"] = 4
    graphs = Graphs(SimpleNamespace(max_rows=8), ["first"])  # type: ignore[arg-type]
    assert make_graph_model(config, torch.nn.Linear(4, 4), graphs, {}) is None
    return graphs.sizes.overlap_from


def test_a_dense_model_with_plain_weights_overlaps(llama: Path, warned: list[str]) -> None:
    assert overlap_of(tiny_config(llama)) == 4
    assert not warned


def test_experts_and_quantised_weights_share_scratch_memory_so_they_don_t(llama: Path, warned: list[str]) -> None:
    config = tiny_config(llama)
    config.model_config.quantization = "fp8"
    assert overlap_of(config) is None
    config.model_config.model_arch_config.num_experts = 4
    assert overlap_of(config) is None
    assert "kernels of fp8 weights" in warned[0] and "experts" in warned[1]


@pytest.mark.parametrize(
    ("roots", "overlap_from", "weights", "kept"),
    [(2, None, None, False), (2, 8, None, False), (2, 0, None, True), (1, None, None, True), (2, None, "fp8", True)],
)
def test_fusion_is_left_out_only_where_two_micro_batches_could_meet_in_it(
    llama: Path, roots: int, overlap_from: int | None, weights: str | None, kept: bool
) -> None:
    config = tiny_config(llama)
    config.parallel_config.tensor_parallel_size = roots
    config.model_config.quantization = weights
    config.additional_config["token_parallel"]["overlap_from"] = overlap_from
    config.compilation_config.pass_config.fuse_allreduce_rms = True
    leave_out_fusion(config)
    assert config.compilation_config.pass_config.fuse_allreduce_rms == kept
