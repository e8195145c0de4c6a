"""Greedy tokens of token parallelism on GPUs, equal to plain vLLM's by the rule of compare.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.gpu.cases import CASES, Case
from tests.gpu.running import Runs


@pytest.fixture(scope="session")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    directory: Path = tmp_path_factory.mktemp("gpu")
    wanted = {item.callspec.params["case"] for item in request.session.items if hasattr(item, "callspec")}
    num_gpus = torch.cuda.device_count()
    yield Runs([case for case in CASES if case in wanted and case.num_gpus <= num_gpus], num_gpus, directory)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.ours.name)
def test_greedy_tokens_are_plain_vllm_s(case: Case, request: pytest.FixtureRequest) -> None:
    if torch.cuda.device_count() < case.num_gpus:
        pytest.skip(f"needs {case.num_gpus} GPUs")
    wrong, _, _ = request.getfixturevalue("runs").judge(case)
    assert wrong is None
