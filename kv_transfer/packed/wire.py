"""How pages stand in a slot: as they are, or compressed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from kv_transfer.direct.ids import Ids
from kv_transfer.direct.pages import PageList
from kv_transfer.packed import fp8
from kv_transfer.packed.copier import Copier, Work

Sizes = npt.NDArray[np.int64]

_SCRATCH_BYTES = 16 << 20
"""KV cache that is quantised at a time: torch needs some three times that for the numbers in between."""


@dataclass(frozen=True)
class Slot:
    """A piece of a staging buffer.

    Attributes:
        index: from 0.
        data: its bytes, on the buffer's device.
    """

    index: int
    data: Any

    @property
    def address(self) -> int:
        return int(self.data.data_ptr())


class Wire(Protocol):
    """One way to put pages into a slot and to take them out."""

    def sizes(self, page_bytes: npt.NDArray[np.uint64]) -> Sizes:
        """Bytes that pages of so many bytes take in a slot."""

    def pack(self, pages: PageList, ids: Ids, slot: Slot) -> Work:
        """Starts to put them there."""

    def unpack(self, slot: Slot, pages: PageList, ids: Ids) -> Work:
        """Starts to take them out, in the same order."""


class Plain:
    """Page by page, unchanged."""

    def __init__(self, copier: Copier) -> None:
        self._copier = copier

    def sizes(self, page_bytes: npt.NDArray[np.uint64]) -> Sizes:
        return page_bytes.astype(np.int64)

    def pack(self, pages: PageList, ids: Ids, slot: Slot) -> Work:
        return self._copier.start(pages, ids, *_in_a_row(slot.address, pages.lengths[ids]))

    def unpack(self, slot: Slot, pages: PageList, ids: Ids) -> Work:
        return self._copier.start(*_in_a_row(slot.address, pages.lengths[ids]), pages, ids)


class Compressed:
    """As kv_transfer.packed.fp8 has it: the scales of all pages, then their codes."""

    def __init__(self, copier: Copier, shape: fp8.HeadShape) -> None:
        self._copier = copier
        self._shape = shape
        self._scratch = torch.empty(0, dtype=torch.uint8, device=copier.device)

    def sizes(self, page_bytes: npt.NDArray[np.uint64]) -> Sizes:
        return page_bytes.astype(np.int64) // self._shape.cache_bytes * self._shape.wire_bytes

    def pack(self, pages: PageList, ids: Ids, slot: Slot) -> Work:
        def work() -> None:
            for part, cache, codes in self._parts(pages, ids, slot):
                self._copier.start(pages, ids[part], *_in_a_row(cache.data_ptr(), pages.lengths[ids[part]]))
                fp8.encode(cache, self._shape, *codes)

        return self._copier.run(work)

    def unpack(self, slot: Slot, pages: PageList, ids: Ids) -> Work:
        def work() -> None:
            for part, cache, codes in self._parts(pages, ids, slot):
                fp8.decode(*codes, self._shape, cache)
                self._copier.start(*_in_a_row(cache.data_ptr(), pages.lengths[ids[part]]), pages, ids[part])

        return self._copier.run(work)

    def _parts(self, pages: PageList, ids: Ids, slot: Slot) -> Iterator[tuple[slice, Any, tuple[Any, Any]]]:
        """Some of the ids, room for their pages, and their scales and codes in the slot."""
        page_bytes = int(pages.lengths[0])
        heads = page_bytes // self._shape.cache_bytes
        scales, codes = fp8.split(slot.data, heads * len(ids), self._shape)
        step = max(1, _SCRATCH_BYTES // page_bytes)
        if self._scratch.numel() < min(step, len(ids)) * page_bytes:
            self._scratch = torch.empty(step * page_bytes, dtype=torch.uint8, device=self._copier.device)
        for begin in range(0, len(ids), step):
            end = min(begin + step, len(ids))
            part = slice(begin * heads, end * heads)
            yield slice(begin, end), self._scratch[: (end - begin) * page_bytes], (scales[part], codes[part])


def _in_a_row(address: int, lengths: npt.NDArray[np.uint64]) -> tuple[PageList, Ids]:
    """Pages of these lengths from `address` on, and their numbers."""
    begins = np.concatenate((np.zeros(1, dtype=np.uint64), np.cumsum(lengths)[:-1])) + np.uint64(address)
    return PageList(np.stack((begins, lengths), axis=1)), np.arange(len(lengths), dtype=np.int32)


def slotfuls(sizes: Sizes, slot_bytes: int) -> Iterator[slice]:
    """Cuts a list of pages, which take `sizes` bytes, into as few pieces as fit into a slot each."""
    ends = np.cumsum(sizes)
    begin = 0
    while begin < len(sizes):
        end = int(np.searchsorted(ends, ends[begin] - sizes[begin] + slot_bytes, side="right"))
        assert end > begin, f"a page of {sizes[begin]} bytes does not fit into a slot of {slot_bytes}"
        yield slice(begin, end)
        begin = end
