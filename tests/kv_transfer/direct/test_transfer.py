"""What a copy tells its GPU of the pages; the copies themselves need one (bench/transfer/check.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kv_transfer.direct.pages import RegionIds
from kv_transfer.direct.transfer import PageCopier


def ids(*numbers: int) -> Any:
    return np.array(numbers, dtype=np.int32)


BLOCKS, OTHERS = ids(7, 3), ids(1, 4)
PLAIN = ids(10, 11, 12, 13, 14, 15)


@pytest.fixture
def copier(monkeypatch: pytest.MonkeyPatch) -> Any:
    copier = PageCopier.__new__(PageCopier)
    copier.device = torch.device("cpu")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **kwargs: empty(*size, **kwargs))
    return copier


@pytest.mark.parametrize(
    ("sources", "destinations"),
    [
        (RegionIds(ids(0, 100, 200), BLOCKS), RegionIds(ids(0, 50, 60), OTHERS)),
        (RegionIds(ids(0, 100, 200), BLOCKS), PLAIN),
        (PLAIN, RegionIds(ids(0, 50, 60), OTHERS)),
        (PLAIN, PLAIN[::-1]),
        (RegionIds(ids(0, 100, 200), BLOCKS), RegionIds(ids(0, 50), ids(1, 4, 8))),
    ],
)
def test_the_pages_of_both_sides_pair(copier: Any, sources: Any, destinations: Any) -> None:
    found = copier._on_gpu(sources, destinations)
    assert found.dtype == torch.int32 and found.is_contiguous()
    assert found.tolist() == [np.asarray(sources).tolist(), np.asarray(destinations).tolist()]
