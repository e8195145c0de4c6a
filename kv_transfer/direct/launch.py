"""The two kernels that copy pages, and how each is spread over a GPU.

How fast can it be? A page is a layer's block: 64 KiB for 16 tokens, 8 KV heads of 128, bf16, and 8,192 tokens of 32
layers are 16,384 of them, 1.07 GB: 2.4 ms at the 450 GB/s that NVLink gives an H200 in one direction. A read from the
other GPU takes 1 to 2 us, so 450 to 900 KB must be under way at any time, from as few multiprocessors as will do: the
model runs on the others.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kv_transfer.direct.driver import Kernel

Launch = Callable[[Any, Any, Any, Any, int], None]
"""Starts a copy on the current stream: tables of addresses (int64) of sources and destinations, ids of pages (int32)
into each, and the pages' length in bytes."""


@dataclass(frozen=True)
class BulkShape:
    """Of bulk.cu, for GPUs with bulk copy engines (Hopper and later). `num_blocks * (num_stages - 2)` chunks are under
    way.

    Attributes:
        num_blocks: each takes a multiprocessor's shared memory, and nothing else of it.
    """

    num_blocks: int = 16
    chunk_bytes: int = 32 << 10
    num_stages: int = 6

    def load(self) -> Launch:
        """For the current device."""
        shared_bytes = self.chunk_bytes * self.num_stages
        # Built from bulk.cu by scripts/bulk_ptx.py: a decode engine needs no compiler.
        kernel = Kernel((Path(__file__).parent / "bulk.ptx").read_bytes(), "copy_pages", shared_bytes)

        def launch(sources: Any, destinations: Any, source_ids: Any, destination_ids: Any, length: int) -> None:
            num_pages = len(source_ids)
            pointers = [ctypes.c_uint64(t.data_ptr()) for t in (sources, destinations, source_ids, destination_ids)]
            counts = [ctypes.c_int(n) for n in (num_pages, length, self.chunk_bytes, self.num_stages)]
            kernel.launch(
                min(self.num_blocks, num_pages), 32, torch.cuda.current_stream().cuda_stream, [*pointers, *counts]
            )

        return launch


@dataclass(frozen=True)
class TileShape:
    """Of kernel.py, for all GPUs. `num_programs` tiles are under way.

    Attributes:
        tile_bytes: what a program reads before it writes.
    """

    num_programs: int = 132
    tile_bytes: int = 32 << 10
    num_warps: int = 8

    def load(self) -> Launch:
        """For any device."""
        from kv_transfer.direct.kernel import WORD_BYTES, copy_pages_kernel

        def launch(sources: Any, destinations: Any, source_ids: Any, destination_ids: Any, length: int) -> None:
            num_pages, tiles_per_page = len(source_ids), -(-length // self.tile_bytes)
            copy_pages_kernel[(min(self.num_programs, tiles_per_page * num_pages),)](
                sources,
                destinations,
                source_ids,
                destination_ids,
                num_pages,
                length // 16,
                tiles_per_page,
                TILE_WORDS=self.tile_bytes // WORD_BYTES,
                num_warps=self.num_warps,
            )

        return launch


def default_shape(device: Any) -> BulkShape | TileShape:
    return BulkShape() if torch.cuda.get_device_capability(device) >= (9, 0) else TileShape()
