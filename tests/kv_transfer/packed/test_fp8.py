from __future__ import annotations

from typing import Any

import pytest
import torch

from kv_transfer.packed.fp8 import DTYPES, HeadShape, UnfitError, round_trip

BLOCKS, HEADS, TOKENS, SIZE = 5, 4, 16, 32

HALF_STEP = 2**-4
"""Of a number with three bits behind the point, relative to it."""
LEAST_STEP = 2**-9
"""Between the smallest numbers of E4M3, of which the largest is 448."""


def cache(dtype: str, seed: int = 0) -> Any:
    """Keys and values side by side, of other size from head to head, and with large channels among the keys."""
    values = torch.randn(BLOCKS, HEADS, TOKENS, 2 * SIZE, generator=torch.Generator().manual_seed(seed))
    values *= torch.logspace(-3, 2, HEADS)[:, None, None]
    values[..., [3, 17]] *= 30
    return values.to(DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values_follow", [True, False])
def test_each_element_is_within_half_a_step_of_its_block_head_and_kind(dtype: str, values_follow: bool) -> None:
    sent = cache(dtype)
    shape = HeadShape.of([sent], values_follow)
    arrived = round_trip(sent, shape)
    assert arrived.dtype == sent.dtype and arrived.shape == sent.shape
    apart = (BLOCKS * HEADS, shape.rows, 2, shape.columns)
    before, after = (t.to(torch.float64).contiguous().view(apart) for t in (sent, arrived))
    largest = before.abs().amax(dim=(1, 3), keepdim=True)
    rounding = torch.finfo(sent.dtype).eps * 2  # of the scale, and of the result in the cache's type
    bound = torch.maximum(before.abs() * (HALF_STEP + rounding), largest / 448 * LEAST_STEP * (1 + rounding) / 2)
    smallest = torch.finfo(sent.dtype).tiny * torch.finfo(sent.dtype).eps
    assert ((after - before).abs() <= bound + smallest).all()
    assert (after != before).any(), "or nothing was compressed"


def test_a_scale_is_one_head_s_and_one_kind_s() -> None:
    """As large as they are, they take nothing from their neighbours."""
    plain = cache("float32")
    with_outliers = plain.clone()
    with_outliers[1, 2, :, :SIZE] *= 1e4  # keys of a block and head
    shape = HeadShape.of([plain], values_follow=False)
    same = round_trip(plain, shape) == round_trip(with_outliers, shape)
    assert same[:, :, :, SIZE:].all() and same[0].all() and same[1, [0, 1, 3]].all()


def test_what_stands_behind_a_prompt_does_not_spoil_its_block() -> None:
    sent = cache("bfloat16")
    spoilt = sent.clone()
    spoilt[0, 0, -2:] = float("nan")
    spoilt[0, 0, -1, 5] = float("inf")
    spoilt[1] = 0
    shape = HeadShape.of([sent], values_follow=False)
    arrived = round_trip(spoilt, shape)
    assert arrived[0, 0, :-2].isfinite().all() and (arrived[0, 0, :-2] != 0).float().mean() > 0.9
    assert arrived[0, 0, -2].isnan().all() and not arrived[0, 0, -1, 5].isinf()
    assert (arrived[1] == 0).all()


def test_eight_bits_an_element_and_a_scale_for_each_kind() -> None:
    shape = HeadShape.of([cache("bfloat16")], values_follow=False)
    assert shape.cache_bytes == TOKENS * 2 * SIZE * 2
    assert shape.wire_bytes == TOKENS * 2 * SIZE + 2 * 4


@pytest.mark.parametrize(
    ("caches", "reason"),
    [
        ([torch.zeros(2, 4, 16, 64, dtype=torch.uint8)], "KV cache of uint8 can't be compressed"),
        ([torch.zeros(2, 16, 576, dtype=torch.bfloat16)], r"blocks of shape \[16, 576\]"),
        ([torch.zeros(2, 4, 16, 64), torch.zeros(2, 2, 16, 64)], "2 kinds"),
        ([torch.zeros(2, 16, 4, 64).transpose(1, 2)], "can't be compressed"),
    ],
)
def test_a_cache_that_it_does_not_fit_is_refused_with_a_reason(caches: list[Any], reason: str) -> None:
    with pytest.raises(UnfitError, match=reason):
        HeadShape.of(caches, values_follow=False)
