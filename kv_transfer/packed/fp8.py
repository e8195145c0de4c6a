"""KV cache in eight bits: FP8 E4M3 (https://arxiv.org/abs/2209.05433) with a scale for each block, head, and keys or
values, such that the largest of them becomes the largest number that the format has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""Of caches that can be compressed."""

_CODE = torch.float8_e4m3fn
_LARGEST = torch.finfo(_CODE).max
_LEAST_SCALE = torch.finfo(torch.float32).tiny
_SCALE_BYTES = 4


class UnfitError(ValueError):
    """This KV cache can't be compressed."""


@dataclass(frozen=True)
class HeadShape:
    """What a block holds of one head: `[rows, 2, columns]`, keys and values in the middle.

    Attributes:
        rows, columns: tokens and elements of a key where these alternate, as for FlashAttention; 1 and all elements of
            a block's keys where the values follow them, as for vLLM's attention on CPUs.
        dtype: key of DTYPES.
    """

    rows: int
    columns: int
    dtype: str

    @classmethod
    def of(cls, caches: list[Any], values_follow: bool) -> HeadShape:
        """Of these layers' caches.

        Raises:
            UnfitError: of another kind, or not all alike.
        """
        kinds = {(tuple(cache.shape[1:]), str(cache.dtype).removeprefix("torch.")) for cache in caches}
        if len(kinds) != 1:
            raise UnfitError(f"its layers' KV caches are of {len(kinds)} kinds; compression knows one for all")
        [(shape, dtype)] = kinds
        if dtype not in DTYPES:
            raise UnfitError(f"KV cache of {dtype} can't be compressed, only {', '.join(DTYPES)}")
        if len(shape) != 3 or shape[2] % 2 or not all(cache[0].is_contiguous() for cache in caches):
            raise UnfitError(
                f"blocks of shape {list(shape)} can't be compressed, only heads x tokens x keys and values"
            )
        _, num_tokens, num_elements = shape
        size = num_elements // 2
        return cls(1, num_tokens * size, dtype) if values_follow else cls(num_tokens, size, dtype)

    @property
    def num_elements(self) -> int:
        """Of a block and head."""
        return self.rows * 2 * self.columns

    @property
    def cache_bytes(self) -> int:
        """Of a block and head."""
        return int(self.num_elements * DTYPES[self.dtype].itemsize)

    @property
    def wire_bytes(self) -> int:
        """The same, compressed."""
        return 2 * _SCALE_BYTES + self.num_elements

    def check(self, page_bytes: Any) -> None:
        """Raises UnfitError if pages are not made of whole heads, or not all as long."""
        if (page_bytes != page_bytes[:1]).any() or page_bytes[0] % self.cache_bytes:
            raise UnfitError(
                f"pages can't be compressed that are not some number of {self.cache_bytes} bytes, all alike"
            )


def split(wire: Any, num_heads: int, shape: HeadShape) -> tuple[Any, Any]:
    """Scales `[num_heads, 2]` and codes `[num_heads, rows, 2, columns]` in these bytes; `num_heads` of all blocks
    together."""
    end = num_heads * 2 * _SCALE_BYTES
    scales = wire[:end].view(torch.float32).view(num_heads, 2)
    codes = wire[end : end + num_heads * shape.num_elements].view(_CODE)
    return scales, codes.view(num_heads, shape.rows, 2, shape.columns)


def encode(cache: Any, shape: HeadShape, scales: Any, codes: Any) -> None:
    """Bytes of KV cache to scales and codes as `split` gives them.

    A place that holds no number, or an infinite one, must not spoil its block: behind a prompt's last token stands what
    stood there before. NaN stays NaN, and what is infinite becomes the block's largest.
    """
    values = cache.view(DTYPES[shape.dtype]).view(codes.shape).to(torch.float32)
    largest = values.nan_to_num(0.0, 0.0, 0.0).abs().amax(dim=(1, 3))
    scales.copy_((largest / _LARGEST).clamp_min(_LEAST_SCALE))
    codes.copy_((values / scales[:, None, :, None]).clamp(-_LARGEST, _LARGEST))


def decode(scales: Any, codes: Any, shape: HeadShape, cache: Any) -> None:
    """The reverse, into bytes of KV cache."""
    values = codes.to(torch.float32) * scales[:, None, :, None]
    cache.view(DTYPES[shape.dtype]).view(codes.shape).copy_(values)


def round_trip(cache: Any, shape: HeadShape) -> Any:
    """What arrives of this KV cache, bytes as they are."""
    flat = cache.contiguous().view(-1).view(torch.uint8)
    num_heads = flat.numel() // shape.cache_bytes
    wire = torch.empty(num_heads * shape.wire_bytes, dtype=torch.uint8, device=cache.device)
    parts, arrived = split(wire, num_heads, shape), torch.empty_like(flat)
    encode(flat, shape, *parts)
    decode(*parts, shape, arrived)
    return arrived.view(cache.dtype).view(cache.shape)
