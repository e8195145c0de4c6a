from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

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
