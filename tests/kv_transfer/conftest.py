from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kv_transfer.pair import Pair
from tests.kv_transfer.world import world
from tests.services.building import tiny_config
from tests.services.conftest import llama, no_partition_left_over, quiet

__all__ = ["llama", "no_partition_left_over", "quiet"]


@pytest.fixture(scope="module")
def alone(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the played model is small
    with world(tiny_config(llama, pulls_kv=True), tmp_path_factory.mktemp("world")):
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def pair(llama: Path, alone: None) -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def make(prefill: dict[str, Any] | None = None, decode: dict[str, Any] | None = None) -> Pair:
        made.append(Pair(llama, prefill or {}, decode or {}))
        return made[-1]

    yield make
    for one in made:
        one.decode.shutdown()
        one.prefill.shutdown()


@pytest.fixture(scope="module")
def both(llama: Path, alone: None) -> Iterator[Pair]:
    """Engines for the tests that need nothing special of them."""
    made = Pair(llama, {}, {})
    yield made
    made.decode.shutdown()
    made.prefill.shutdown()
