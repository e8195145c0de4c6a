"""What the two sides of a packed read say to each other; see kv_transfer.packed."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import msgspec
import numpy as np

from kv_transfer.direct.pages import PageList


class Compression(StrEnum):
    """Values of `kv_transfer_compression`."""

    NONE = "none"
    FP8 = "fp8"


class Open(msgspec.Struct):
    """OPEN: the pages that orders on this connection will name by their numbers.

    Attributes:
        runs: see `to_runs`.
    """

    runs: list[tuple[int, int, int, int]]
    compression: Compression = Compression.NONE


class Opened(msgspec.Struct):
    """OPENED: where packed pages will be read.

    Attributes:
        refusal: why there is no packing, or nothing; then the rest holds.
        agent: NIXL's metadata.
        whole: address, bytes, device and memory of the staging buffer.
        head_shape: kv_transfer.packed.fp8.HeadShape's fields, if compressed.
    """

    refusal: str = ""
    agent: bytes = b""
    whole: tuple[int, int, int, str] = (0, 0, 0, "")
    slot_bytes: int = 0
    probe: bytes = b""
    head_shape: tuple[int, int, str] | None = None


class Pack(msgspec.Struct):
    """PACK: an order, by a number that the reader gives it, with the numbers of its pages as int32."""

    order: int
    ids: bytes


class Packed(msgspec.Struct):
    """PACKED: the pages of an order stand in this slot; none, with a reason, if that can't be."""

    order: int
    slot: int = -1
    refusal: str = ""


class Free(msgspec.Struct):
    """FREE: the reader wants nothing of its order any more."""

    order: int


OPEN, OPENED, PACK, PACKED, FREE = "packed/open", "packed/opened", "packed/pack", "packed/packed", "packed/free"
NUDGE = "packed/nudge"
"""Says nothing; a peer that it can't be sent to is gone."""


def to_runs(pages: PageList) -> list[tuple[int, int, int, int]]:
    """Address, bytes, stride and count of each run of equal pages at equal distances; a cache's layer is one."""
    addresses, lengths = pages.addresses.astype(np.int64), pages.lengths.astype(np.int64)
    strides = np.diff(addresses)
    runs: list[tuple[int, int, int, int]] = []
    # A run ends where the length changes, or the stride does.
    ends = np.flatnonzero((np.diff(lengths) != 0) | np.append(np.diff(strides) != 0, False)).tolist()
    begin = 0
    for end in [*ends, len(addresses) - 1]:
        if end < begin:
            continue
        stride = int(strides[begin]) if end > begin else 0
        runs.append((int(addresses[begin]), int(lengths[begin]), stride, end - begin + 1))
        begin = end + 1
    return runs


def from_runs(runs: Sequence[tuple[int, int, int, int]]) -> PageList:
    parts: list[Any] = []
    for address, length, stride, count in runs:
        part = np.empty((count, 3), dtype=np.int64)
        part[:, 0] = address + np.arange(count) * stride
        part[:, 1], part[:, 2] = length, 0
        parts.append(part)
    return PageList(np.concatenate(parts))
