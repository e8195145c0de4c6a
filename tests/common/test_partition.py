from __future__ import annotations

import pytest

from tknp.common.partition import BlockPartition, RankPlace, get_partition, get_place, set_partition, set_place


def test_each_rank_owns_the_ids_after_its_base() -> None:
    partition = BlockPartition((3, 1, 4))
    assert partition.bases == (0, 3, 4)
    assert [partition.rank_of(i) for i in range(8)] == [0, 0, 0, 1, 2, 2, 2, 2]
    assert (partition.size, partition.total) == (3, 8)


def test_a_rank_without_blocks_owns_none() -> None:
    assert [BlockPartition((2, 0, 2)).rank_of(i) for i in range(4)] == [0, 0, 2, 2]


@pytest.mark.parametrize("block_id", [-1, 8, 100])
def test_an_id_outside_the_partition_belongs_to_nobody(block_id: int) -> None:
    with pytest.raises(ValueError, match=f"block {block_id} belongs to no rank.*3 ranks hold 8"):
        BlockPartition((3, 1, 4)).rank_of(block_id)


def test_the_owner_of_a_request_is_the_rank_of_all_its_blocks() -> None:
    partition = BlockPartition((3, 1, 4))
    assert partition.rank_of_all([4, 7, 5]) == 2
    assert partition.rank_of_all([]) is None


def test_a_request_that_was_split_is_refused() -> None:
    with pytest.raises(ValueError, match="ranks 0 to 2;"):
        BlockPartition((3, 1, 4)).rank_of_all([2, 4])


def test_a_place_is_a_rank_with_its_range() -> None:
    place = RankPlace(2, BlockPartition((3, 1, 4)))
    assert (place.base, place.num_blocks) == (4, 4)


def test_the_partition_of_a_process_is_what_was_set_last() -> None:
    assert (get_partition(), get_place()) == (None, None)
    partition = BlockPartition((2, 2))
    place = RankPlace(1, partition)
    try:
        set_partition(partition)
        set_place(place)
        assert get_partition() is partition
        assert get_place() is place
    finally:
        set_partition(None)
        set_place(None)
    assert (get_partition(), get_place()) == (None, None)
