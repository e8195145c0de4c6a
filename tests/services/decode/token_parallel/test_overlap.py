"""The rule, with what two H200s took for the steps of an 8B shape (bench/results/decode-2xh200.json, overlap_rows)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.decode.token_parallel.overlap import Overlap, RootPace

ROOT = RootPace(
    num_layers=32,
    rows=(16, 48, 104, 208),
    halved=(0.0079, 0.0087, 0.0096, 0.0106),
    whole=(0.0052, 0.0055, 0.0061, 0.0077),
)
TWO = Overlap(ROOT, block_seconds=4.7e-7, num_ranks=2)
FOUR = replace(TWO, num_ranks=4)


def placed(overlap: Overlap, rows: int, tokens: int) -> list[int]:
    """Blocks of each rank, as placement divides so many."""
    blocks, work = rows * tokens // 16, overlap.root_work(rows, rows * tokens // 16)
    share = (blocks + work) // overlap.num_ranks
    return [share - work, *[share] * (overlap.num_ranks - 1)]


@pytest.mark.parametrize(
    ("rows", "tokens", "pays"),
    [
        (16, 1024, False),
        (208, 1024, False),
        (16, 8192, False),
        (104, 8192, False),
        (208, 8192, True),
        (48, 32768, False),
    ],
)
def test_two_ranks_overlap_where_they_were_faster(rows: int, tokens: int, pays: bool) -> None:
    assert bool(TWO.root_work(rows, rows * tokens // 16)) is pays
    assert TWO.pays(rows, placed(TWO, rows, tokens)) is pays


@pytest.mark.parametrize("rows", [104, 208])
def test_the_more_ranks_wait_for_the_root_the_sooner_it_pays(rows: int) -> None:
    assert FOUR.pays(rows, placed(FOUR, rows, 8192))


def test_a_root_that_has_as_much_attention_as_the_others_would_be_the_last() -> None:
    assert not TWO.pays(208, [53_248, 53_248])
    assert not FOUR.pays(208, [26_624] * 4)


def test_what_is_placed_for_two_micro_batches_stays_faster_in_two_with_fewer_rows() -> None:
    blocks = placed(TWO, 208, 8192)
    assert TWO.pays(104, [each // 2 for each in blocks])


def test_short_requests_don_t_pay_for_a_second_read_of_the_weights_however_many_ranks_there_are() -> None:
    eight = replace(TWO, num_ranks=8)
    assert not eight.pays(64, placed(eight, 64, 2048))


def test_where_there_is_no_other_graph_there_is_no_choice() -> None:
    assert replace(TWO, root=replace(ROOT, whole=())).pays(16, [1, 0])


def test_a_root_is_given_less_attention_only_where_steps_overlap() -> None:
    assert TWO.root_work(208, 208 * 512) == round(0.0106 / 4.7e-7)
    assert TWO.root_work(104, 104 * 512) == 0
    assert FOUR.root_work(156, 156 * 512) == round((0.0096 + 0.0106) / 2 / 4.7e-7)


@pytest.mark.parametrize("rows", [8, 209])
def test_fewer_rows_than_two_micro_batches_begin_with_and_more_than_a_graph_holds_never_overlap(rows: int) -> None:
    assert replace(TWO, root=replace(ROOT, whole=())).root_work(rows, rows * 512) == 0
