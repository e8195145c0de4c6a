"""What a copy tells its GPU of the pages; the copies themselves need one (bench/transfer/check.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kv_transfer.direct.ids import PageIds, RegionIds, as_ids


def ids(*numbers: int) -> Any:
    return np.array(numbers, dtype=np.int32)


@pytest.fixture(autouse=True)
def unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **kwargs: empty(*size, **kwargs))


BLOCKS, OTHERS = ids(7, 3), ids(1, 4)
PLAIN = ids(10, 11, 12, 13, 14, 15)


def test_ids_by_region_are_those_that_nixl_would_be_given() -> None:
    by_region = RegionIds(ids(0, 100, 200), BLOCKS)
    assert len(by_region) == 6
    assert np.asarray(by_region).tolist() == [7, 3, 107, 103, 207, 203]
    assert as_ids(by_region) is by_region
    assert np.asarray(by_region[2:6]).tolist() == [107, 103, 207, 203]
    with pytest.raises(AssertionError, match="cuts a region of 2 blocks"):
        by_region[1:4]
    plain = as_ids(np.array([5], dtype=np.int64))
    assert isinstance(plain, np.ndarray) and plain.dtype == np.int32


def read(pairs: PageIds, side: int) -> list[int]:
    """As a kernel does: `offsets[r] + blocks[b]`."""
    regions, blocks = pairs.num_regions, pairs.num_blocks
    own = pairs.pinned.numpy()[side * (regions + blocks) :]
    return [int(own[i // blocks] + own[regions + i % blocks]) for i in range(pairs.num_pages)]


@pytest.mark.parametrize(
    ("sources", "destinations", "num_regions"),
    [
        (RegionIds(ids(0, 100, 200), BLOCKS), RegionIds(ids(0, 50, 60), OTHERS), 3),
        (RegionIds(ids(0, 100, 200), BLOCKS), PLAIN, 1),
        (PLAIN, RegionIds(ids(0, 50, 60), OTHERS), 1),
        (PLAIN, PLAIN[::-1], 1),
        (RegionIds(ids(0, 100, 200), BLOCKS), RegionIds(ids(0, 50), ids(1, 4, 8)), 1),
    ],
)
def test_the_pages_of_both_sides_pair(sources: Any, destinations: Any, num_regions: int) -> None:
    pairs = PageIds.of(sources, destinations)
    assert pairs.pinned.dtype == torch.int32 and pairs.num_regions == num_regions
    assert read(pairs, 0) == np.asarray(sources).tolist()
    assert read(pairs, 1) == np.asarray(destinations).tolist()


def test_of_pages_of_other_lengths_nothing_is_told() -> None:
    pairs = PageIds.of(RegionIds(ids(0, 100, 200), BLOCKS), PLAIN, np.array([False, True, True, False, False, True]))
    assert read(pairs, 0) == [3, 107, 203]
    assert read(pairs, 1) == [11, 12, 15]
