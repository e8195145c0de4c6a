"""Traces as torch's profiler writes them, of two layers and two micro-batches on two streams."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from bench.breakdown import RankTime, as_json, efficiency, kind_of, read, table

STEP = 1000.0  # microseconds


def kernel(name: str, start: float, duration: float, stream: int = 7) -> dict[str, Any]:
    return {"cat": "kernel", "name": name, "ts": start, "dur": duration, "args": {"stream": stream}}


def trace(path: Path, num_steps: int) -> Path:
    """Each step has two layers; in each, two micro-batches overlap, and nothing covers a wait of 100 us."""
    events = [{"cat": "cpu_op", "name": "aten::mm", "ts": 0.0, "dur": 1e6}]
    for step in range(num_steps):
        for layer in range(2):
            start = step * STEP + layer * 500
            events += [
                kernel("vllm::reshape_and_cache_flash_kernel", start, 10),
                kernel("cutlass::device_kernel<flash::FlashAttnFwdSm90>", start + 10, 90),
                kernel("wait_for_flags", start + 100, 100),
                kernel("vllm::reshape_and_cache_flash_kernel", start + 200, 10, stream=8),
                kernel("nvjet_sm90_tst_448x64_64x3", start + 210, 100),
                kernel("cutlass::device_kernel<flash::FlashAttnFwdSm90>", start + 260, 240, stream=8),
            ]
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events}, file)
    return path


def test_a_step_s_time_is_told_apart_by_kind_and_overlap_counts_once(tmp_path: Path) -> None:
    rank = read(trace(tmp_path / "rank0.json.gz", 4), rank=0, num_layers=2, num_micro_batches=2)
    assert rank.num_steps == 3
    assert rank.step == pytest.approx(1.0)
    assert rank.kinds == pytest.approx({"kv write": 0.04, "attention": 0.66, "wait": 0.2, "matrix products": 0.2})
    assert rank.busy == pytest.approx(0.8)
    assert rank.idle == pytest.approx(0.2)


def test_a_trace_without_a_whole_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no whole decode step of 2 layers"):
        read(trace(tmp_path / "rank0.json.gz", 1), rank=0, num_layers=2, num_micro_batches=2)


def test_efficiency_is_the_share_of_all_ranks_time_in_which_they_computed() -> None:
    ranks = [RankTime(0, 3, 10.0, {"wait": 2.0}, 9.0), RankTime(1, 3, 10.0, {"attention": 6.0}, 6.0)]
    assert efficiency(ranks) == pytest.approx(0.75)
    assert as_json(ranks)["token_parallel_efficiency"] == 0.75
    lines = table(ranks).splitlines()
    assert lines[0].split() == ["rank", "step", "wait", "attention", "other", "idle"]
    assert lines[2].split() == ["1", "10.00", "0.00", "6.00", "0.00", "4.00"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("put_rows", "send"),
        ("ncclDevKernel_SendRecv", "send"),
        ("take_rows", "take"),
        ("flash::prepare_varlen_num_blocks_kernel", "attention"),
        ("void cublasLt::splitKreduce_kernel", "matrix products"),
        ("triton_red_fused_add_rms_norm_0", "other"),
    ],
)
def test_kernels_are_known_by_name(name: str, kind: str) -> None:
    assert kind_of(name) == kind
