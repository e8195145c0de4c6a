from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest

from kv_transfer.shapes import CacheShape, UnreadableError


def refused(pattern: str) -> AbstractContextManager[object]:
    return pytest.raises(UnreadableError, match=pattern)


@pytest.mark.parametrize(
    ("ours", "theirs", "num_kv_heads", "is_latent", "outcome"),
    [
        (1, 1, 4, False, nullcontext()),
        (1, 4, 4, False, nullcontext()),
        (4, 1, 4, False, nullcontext()),
        (8, 1, 4, False, nullcontext()),  # heads are copied here
        (8, 8, 4, False, nullcontext()),
        (1, 8, 4, True, nullcontext()),
        (2, 3, 8, False, refused(r"3 \(prefill\) and 2 \(decode\) don't fit: one must be a multiple")),
        (1, 8, 4, False, refused(r"8 tensor-parallel workers hold copies of the model's 4 KV heads.*size 4 at most")),
    ],
)
def test_workers(
    ours: int, theirs: int, num_kv_heads: int, is_latent: bool, outcome: AbstractContextManager[object]
) -> None:
    with outcome:
        CacheShape(ours, num_kv_heads, is_latent).check_workers(theirs)


@pytest.mark.parametrize(
    ("ours", "theirs", "their_workers", "outcome"),
    [
        (32, 32, 4, nullcontext()),
        (64, 32, 1, nullcontext()),
        (64, 32, 2, refused(r"blocks of 32 tokens \(prefill\) and 64 \(decode\).*the same --block-size")),
        (32, 64, 1, refused("--block-size 64, or a multiple")),
        (48, 32, 1, refused("blocks have 32 tokens and ours 48, which is no multiple")),
    ],
)
def test_blocks(ours: int, theirs: int, their_workers: int, outcome: AbstractContextManager[object]) -> None:
    with outcome:
        CacheShape(1, 4, False).check_blocks(ours, theirs, their_workers)
