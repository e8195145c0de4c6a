from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from services.decode.token_parallel.rows import RowLayout

LAYOUTS = [
    RowLayout(num_heads=4, num_kv_heads=2, head_size=8, head_size_v=8, shares_cache=False),
    RowLayout(num_heads=4, num_kv_heads=1, head_size=8, head_size_v=16, shares_cache=False),
    RowLayout(num_heads=4, num_kv_heads=2, head_size=8, head_size_v=8, shares_cache=True),
]


def qkv(layout: RowLayout, num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(num_rows, layout.num_heads, layout.head_size),
        torch.randn(num_rows, layout.num_kv_heads, layout.head_size),
        torch.randn(num_rows, layout.num_kv_heads, layout.head_size_v),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chosen", [[3], [0, 1, 2, 3, 4, 5], [5, 0, 3], []])
def test_unpacking_gives_the_chosen_rows_back(layout: RowLayout, chosen: list[int]) -> None:
    query, key, value = qkv(layout, 6)
    rows = torch.tensor(chosen, dtype=torch.int64)
    packed = layout.pack(query, key, value, rows)
    buffer = layout.empty_rows(len(chosen), packed.dtype, packed.device)
    assert packed.is_contiguous()
    assert packed.shape == buffer.shape, "what is sent must fill what it is received into"
    unpacked = layout.unpack(packed)
    expected = (query[rows], None, None) if layout.shares_cache else (query[rows], key[rows], value[rows])
    for got, want in zip(unpacked, expected, strict=True):
        if want is None:
            assert got is None
        else:
            assert got is not None
            assert got.is_contiguous()
            assert torch.equal(got, want)


def test_outputs_have_the_value_s_head_size() -> None:
    layout = LAYOUTS[1]
    like = torch.zeros(1, dtype=torch.bfloat16)
    assert layout.empty_output(3, like).shape == (3, 4, 16)
    assert layout.empty_output(3, like).dtype == torch.bfloat16


@pytest.mark.parametrize(("target", "shares"), [(None, False), ("layers.0", True)])
def test_the_layout_is_that_of_the_layer(target: str | None, shares: bool) -> None:
    layer: Any = SimpleNamespace(
        num_heads=4, num_kv_heads=1, head_size=8, head_size_v=16, kv_sharing_target_layer_name=target
    )
    assert RowLayout.of(layer) == RowLayout(4, 1, 8, 16, shares)
