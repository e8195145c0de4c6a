from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.decode.token_parallel.splits import choose_splits, sm_margin

MEASURED = json.loads((Path(__file__).parents[4] / "bench/results/attention-h200.json").read_text())
NUM_SMS: int = MEASURED["num_sms"]
MOST = 5


def flash_attention_parts(num_blocks: int, work: int, num_sms: int, margin: int) -> int:
    """The rule of prepare_varlen_num_blocks_kernel (flash-attention, hopper/flash_prepare_scheduler.cu)."""
    share = -(-int(np.ceil(1.1 * work)) // (num_sms - margin))
    return -(-num_blocks // share)


def time_of_choice(row: dict[str, Any]) -> float:
    """What attention took when it was cut as is chosen for this row, in microseconds."""
    lens = np.full(row["rows"], row["tokens"], np.int32)
    if not sm_margin(lens, row["num_kv_heads"], NUM_SMS):
        return float(row["own_us"])
    num_waves = row["rows"] * row["num_kv_heads"] / NUM_SMS
    return float(row["us"][str(choose_splits(num_waves, row["tokens"] // 128))])


@pytest.mark.parametrize("row", MEASURED["rows"], ids=lambda r: f"{r['rows']}x{r['num_kv_heads']} of {r['tokens']}")
def test_the_parts_chosen_are_nearly_the_fastest(row: dict[str, Any]) -> None:
    assert time_of_choice(row) <= 1.05 * min(row["us"].values())


def test_the_choice_is_better_than_flash_attentions_own_on_average() -> None:
    rows = MEASURED["rows"]
    chosen, own = (
        np.mean([time / min(row["us"].values()) for row, time in zip(rows, times, strict=True)])
        for times in ([time_of_choice(row) for row in rows], [row["own_us"] for row in rows])
    )
    assert chosen < 1.01 < 1.05 < own


@pytest.mark.parametrize("rows", range(1, 130, 7))
@pytest.mark.parametrize(("num_blocks", "num_kv_heads"), [(64, 8), (256, 1), (256, 2)])
def test_the_margin_makes_flash_attention_cut_as_chosen(rows: int, num_blocks: int, num_kv_heads: int) -> None:
    work = rows * num_blocks * num_kv_heads
    wanted = choose_splits(work / (132 * num_blocks), num_blocks)
    margin = sm_margin(np.full(rows, num_blocks * 128, np.int32), num_kv_heads, 132)
    parts = flash_attention_parts(num_blocks, work, 132, margin)
    # With hardly any work, FlashAttention's own finer parts stand.
    assert parts == wanted or (wanted == MOST and parts > wanted and not margin)


def test_rows_without_length_count_for_nothing() -> None:
    lens = np.full(36, 8192, np.int32)
    padded = np.concatenate([lens, np.zeros(92, np.int32)])
    assert sm_margin(padded, 8, 132) == sm_margin(lens, 8, 132) < 0
    assert sm_margin(np.zeros(4, np.int32), 8, 132) == 0
