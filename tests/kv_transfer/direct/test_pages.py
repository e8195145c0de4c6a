from __future__ import annotations

import numpy as np
import pytest

from kv_transfer.direct.pages import Mapping, PageList, UnreachableError


def pages(*rows: tuple[int, int]) -> PageList:
    return PageList([(address, length, 0) for address, length in rows])


def test_pages_are_found_by_the_mapping_that_they_lie_in() -> None:
    mappings = [Mapping(0x1000, 0x100, 0x9000_0000_0000), Mapping(0x2000, 0x100, 0x500)]
    moved = pages((0x1000, 16), (0x20F0, 16), (0x1080, 0x80)).mapped(mappings)
    assert moved.addresses.tolist() == [0x9000_0000_0000, 0x5F0, 0x9000_0000_0080]
    assert moved.lengths.tolist() == [16, 16, 0x80]


@pytest.mark.parametrize("outside", [(0xFFF, 16), (0x10F1, 16), (0x3000, 16)], ids=["before", "over the end", "beyond"])
def test_a_page_outside_of_what_was_shared_is_refused(outside: tuple[int, int]) -> None:
    with pytest.raises(UnreachableError, match="1 of 2 pages lie in memory that was not shared"):
        pages((0x1000, 16), outside).mapped([Mapping(0x1000, 0x100, 0)])


def test_the_kernel_reads_16_bytes_at_once() -> None:
    pages((0x1000, 32), (0x2010, 16)).check_alignment()
    for odd in ((0x1008, 16), (0x1000, 24)):
        with pytest.raises(UnreachableError, match="1 of 2 pages are not aligned to 16 bytes"):
            pages((0x2000, 16), odd).check_alignment()


def test_pages_of_one_length_are_one_launch_and_of_several_one_each() -> None:
    same = pages(*[(i * 64, 64) for i in range(4)])
    assert list(same.by_length(np.array([3, 1], dtype=np.int32))) == [(64, None)]
    mixed = pages((0, 64), (64, 16), (128, 64))
    assert {length for length, _ in mixed.by_length(np.array([2, 0], dtype=np.int32))} == {64}
    found = {length: mask.tolist() for length, mask in mixed.by_length(np.array([2, 1, 0], dtype=np.int32))}
    assert found == {16: [False, True, False], 64: [True, False, True]}


def test_addresses_keep_all_their_bits_on_the_gpu() -> None:
    assert pages((0x7FFF_FFFF_FFF0, 16)).table("cpu").tolist() == [0x7FFF_FFFF_FFF0]
