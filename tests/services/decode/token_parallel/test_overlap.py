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
    assert TWO.pays(rows, rows * tokens // 16) is pays


def test_the_more_ranks_wait_for_the_root_the_sooner_it_pays() -> None:
    assert FOUR.pays(104, 104 * 8192 // 16)
    assert FOUR.pays(208, 208 * 8192 // 16)


def test_short_requests_don_t_pay_for_a_second_read_of_the_weights_however_many_ranks_there_are() -> None:
    assert not replace(TWO, num_ranks=8).pays(64, 64 * 2048 // 16)


def test_where_there_is_no_other_graph_there_is_no_choice() -> None:
    assert replace(TWO, root=replace(ROOT, whole=())).pays(16, 1)


def test_a_root_is_given_less_attention_only_where_steps_overlap() -> None:
    assert TWO.root_work(208, 208 * 512) == round(0.0106 / 4.7e-7)
    assert TWO.root_work(104, 104 * 512) == 0
    assert FOUR.root_work(156, 156 * 512) == round((0.0096 + 0.0106) / 2 / 4.7e-7)
    assert replace(TWO, root=replace(ROOT, whole=())).root_work(8, 8 * 512) == 0, "fewer rows never overlap"
