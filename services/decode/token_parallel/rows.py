"""How one layer's query, key and value rows are laid out on the wire."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class RowLayout:
    """Sizes of one layer; a row on the wire is `[query | key | value]`, and its output `[num_heads * head_size_v]`."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    head_size_v: int
    shares_cache: bool
    """The layer reads another layer's cache and has no key and value of its own."""

    @classmethod
    def of(cls, layer: Any) -> RowLayout:
        """The layout of a vLLM `Attention` layer."""
        return cls(
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_size=layer.head_size,
            head_size_v=layer.head_size_v,
            shares_cache=layer.kv_sharing_target_layer_name is not None,
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """Elements of query, key and value in a row; of the query alone where the cache is shared."""
        query = self.num_heads * self.head_size
        if self.shares_cache:
            return (query,)
        return (query, self.num_kv_heads * self.head_size, self.num_kv_heads * self.head_size_v)

    def pack(
        self, query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None, rows: torch.Tensor
    ) -> torch.Tensor:
        """The chosen rows of `[num_rows, heads, head_size]` tensors, as one contiguous `[len(rows), sum(widths)]`."""
        parts = (query,) if self.shares_cache else (query, key, value)
        return torch.cat([part.index_select(0, rows).flatten(1) for part in parts if part is not None], dim=1)

    def empty_rows(self, num_rows: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A buffer that `pack`'s result is received into."""
        return torch.empty(num_rows, sum(self.widths), dtype=dtype, device=device)

    def views(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """As `unpack`, without copies: heads and elements are contiguous, rows are not."""
        parts = packed.split(self.widths, dim=1)
        query = parts[0].unflatten(1, (self.num_heads, self.head_size))
        if self.shares_cache:
            return query, None, None
        key = parts[1].unflatten(1, (self.num_kv_heads, self.head_size))
        return query, key, parts[2].unflatten(1, (self.num_kv_heads, self.head_size_v))

    def unpack(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Undoes `pack`: contiguous query, key and value."""
        parts = [part.contiguous() for part in packed.split(self.widths, dim=1)]
        query = parts[0].view(-1, self.num_heads, self.head_size)
        if self.shares_cache:
            return query, None, None
        key = parts[1].view(-1, self.num_kv_heads, self.head_size)
        return query, key, parts[2].view(-1, self.num_kv_heads, self.head_size_v)

    def empty_output(self, num_rows: int, like: torch.Tensor) -> torch.Tensor:
        """A buffer for attention outputs, `[num_rows, num_heads, head_size_v]`, of `like`'s type and device."""
        return like.new_empty(num_rows, self.num_heads, self.head_size_v)
