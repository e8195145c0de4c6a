from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

with warnings.catch_warnings():
    # torch warns of its own use of torch.jit when vLLM first imports it.
    warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated", DeprecationWarning)
    from tests.services.building import silence_vllm
from tknp.common.partition import set_partition, set_place
from tknp.tiny_model import make_tiny_model


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's directory."""
    directory = tmp_path_factory.mktemp("llama")
    make_tiny_model(directory, shape="llama", seed=0)
    return directory


@pytest.fixture(autouse=True, scope="session")
def quiet() -> None:
    silence_vllm()


@pytest.fixture(autouse=True)
def no_partition_left_over() -> Iterator[None]:
    yield
    set_partition(None)
    set_place(None)
