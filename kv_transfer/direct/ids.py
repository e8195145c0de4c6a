"""Which pages of a list: by their numbers, or by region and block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class RegionIds:
    """Ids of the pages of the same blocks in each region, region by region: `offsets[r] + blocks[b]`.

    A prompt's ids are many times its blocks (32 layers: 65,536 for 32,768 tokens), and the copy waits for them.

    Attributes:
        offsets: `[num_regions]`.
        blocks: `[num_blocks]`.
    """

    offsets: Ids
    blocks: Ids

    def __len__(self) -> int:
        return len(self.offsets) * len(self.blocks)

    def __getitem__(self, pages: slice) -> RegionIds:
        """Of some regions: `pages` must begin and end with one."""
        bounds = [divmod(page, len(self.blocks)) for page in (pages.start, pages.stop)]
        (first, _), (end, _) = bounds
        assert not any(rest for _, rest in bounds), f"{pages} cuts a region of {len(self.blocks)} blocks"
        return RegionIds(self.offsets[first:end], self.blocks)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return (self.offsets[:, None] + self.blocks).reshape(-1).astype(dtype or np.int32)


AnyIds = Ids | RegionIds


def as_ids(ids: Any) -> AnyIds:
    """As the copier takes them."""
    return ids if isinstance(ids, RegionIds) else np.asarray(ids, dtype=np.int32)


@dataclass(frozen=True)
class PageIds:
    """Pages on both sides of a copy, as its kernel reads them.

    Attributes:
        pinned: int32 in the host's memory, which the GPU may read: the sources' offsets and blocks, then those of the
            destinations; see RegionIds.
    """

    pinned: Any
    num_regions: int
    num_blocks: int

    @classmethod
    def of(cls, sources: AnyIds, destinations: AnyIds, mask: Any = None) -> PageIds:
        """Pairs them, one by one; those that a mask chooses, if there is one."""
        pair = [ids if isinstance(ids, RegionIds) else _one_region(ids) for ids in (sources, destinations)]
        if mask is not None or len(pair[0].offsets) != len(pair[1].offsets):
            pair = [_one_region(np.asarray(ids)[... if mask is None else mask]) for ids in (sources, destinations)]
        parts = [part for ids in pair for part in (ids.offsets, ids.blocks)]
        pinned = torch.empty(sum(map(len, parts)), dtype=torch.int32, pin_memory=True)
        # By numpy: torch wakes a thread per core to copy more than 32,768 of them, which takes 4 ms on 64 cores.
        np.concatenate(parts, out=pinned.numpy())
        return cls(pinned, len(pair[0].offsets), len(pair[0].blocks))

    @property
    def num_pages(self) -> int:
        return self.num_regions * self.num_blocks


def _one_region(ids: Ids) -> RegionIds:
    return RegionIds(np.zeros(1, dtype=np.int32), ids)
