"""Lists of pages: where each begins and how long it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kv_transfer.direct.ids import AnyIds

ALIGNMENT = 16
"""Bytes, of addresses and lengths: what one thread of the kernel reads at once."""


class UnreachableError(RuntimeError):
    """A list has pages that the kernel can't read."""


@dataclass(frozen=True)
class Mapping:
    """A stretch of another process's memory, and where it lies in this one."""

    base: int
    size: int
    address: int


class PageList:
    """Pages as NIXL's descriptors give them: `[num_pages, 3]` of address, bytes and device."""

    def __init__(self, descriptors: Any) -> None:
        columns = np.asarray(descriptors, dtype=np.uint64)
        self.addresses: npt.NDArray[np.uint64] = columns[:, 0].copy()
        self.lengths: npt.NDArray[np.uint64] = columns[:, 1].copy()
        self._table: Any = None
        self._is_uniform = bool((self.lengths == self.lengths[:1]).all())

    def mapped(self, mappings: Iterable[Mapping]) -> PageList:
        """The same pages by their addresses in this process.

        Raises:
            UnreachableError: pages outside of all mappings.
        """
        addresses = np.zeros_like(self.addresses)
        found = np.zeros(len(addresses), dtype=bool)
        for mapping in mappings:
            base, end = np.uint64(mapping.base), np.uint64(mapping.base + mapping.size)
            inside = (self.addresses >= base) & (self.addresses + self.lengths <= end)
            addresses[inside] = self.addresses[inside] - base + np.uint64(mapping.address)
            found |= inside
        if not found.all():
            raise UnreachableError(
                f"{np.count_nonzero(~found)} of {len(found)} pages lie in memory that was not shared"
            )
        return PageList(np.stack((addresses, self.lengths), axis=1))

    def check_alignment(self) -> None:
        """Raises UnreachableError for pages that don't begin and end where the kernel can read."""
        odd = np.count_nonzero((self.addresses | self.lengths) % np.uint64(ALIGNMENT))
        if odd:
            raise UnreachableError(f"{odd} of {len(self.addresses)} pages are not aligned to {ALIGNMENT} bytes")

    def table(self, device: Any) -> Any:
        """The addresses on the GPU, int64, `[num_pages]`."""
        if self._table is None:
            self._table = torch.from_numpy(self.addresses.view(np.int64)).to(device)
        return self._table

    def by_length(self, ids: AnyIds) -> Iterator[tuple[int, Any]]:
        """Lengths in bytes, each with a mask of the positions in `ids` of its pages; None for all."""
        if self._is_uniform:
            yield int(self.lengths[0]), None
            return
        lengths = self.lengths[np.asarray(ids)]
        for length in np.unique(lengths):
            yield int(length), lengths == length
