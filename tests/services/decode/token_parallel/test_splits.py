from __future__ import annotations

import numpy as np
import pytest

from services.decode.token_parallel.splits import choose_splits, sm_margin


@pytest.mark.parametrize(
    ("rows", "splits"),
    # By 8 KV heads on 132 multiprocessors; what was fastest of one to four on an H200, within its noise.
    [(16, {1}), (29, {1}), (33, {1}), (36, {3, 4}), (40, {2, 3}), (50, {3, 4}), (58, {1}), (66, {1})],
)
def test_the_parts_that_were_fastest_are_chosen(rows: int, splits: set[int]) -> None:
    assert choose_splits(rows * 8 / 132) in splits


def flash_attention_parts(num_blocks: int, work: int, num_sms: int, margin: int) -> int:
    """The rule of prepare_varlen_num_blocks_kernel (flash-attention, hopper/flash_prepare_scheduler.cu)."""
    share = -(-int(np.ceil(1.1 * work)) // (num_sms - margin))
    return -(-num_blocks // share)


@pytest.mark.parametrize("rows", range(1, 130, 7))
@pytest.mark.parametrize(("num_blocks", "num_kv_heads"), [(64, 8), (256, 1), (256, 2)])
def test_the_margin_makes_flash_attention_cut_as_chosen(rows: int, num_blocks: int, num_kv_heads: int) -> None:
    work = rows * num_blocks * num_kv_heads
    wanted = choose_splits(work / (132 * num_blocks))
    margin = sm_margin(np.full(rows, num_blocks * 128, np.int32), num_kv_heads, 132)
    parts = flash_attention_parts(num_blocks, work, 132, margin)
    # With hardly any work, FlashAttention's own finer parts stand.
    assert parts == wanted or (wanted == 4 and parts > wanted and not margin)


def test_less_than_a_round_is_not_cut_into_more_than_one() -> None:
    # Measured on an H200: FlashAttention by itself makes 176 parts for 132 multiprocessors.
    assert flash_attention_parts(256, 88 * 256, 132, 0) == 2
    assert flash_attention_parts(256, 88 * 256, 132, sm_margin(np.full(88, 32768, np.int32), 1, 132)) == 1


def test_rows_without_length_count_for_nothing() -> None:
    lens = np.full(36, 8192, np.int32)
    padded = np.concatenate([lens, np.zeros(92, np.int32)])
    assert sm_margin(padded, 8, 132) == sm_margin(lens, 8, 132) < 0
    assert sm_margin(np.zeros(4, np.int32), 8, 132) == 0
