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
from kv_transfer.direct.ids import PageIds

Launch = Callable[[Any, Any, Any, PageIds, int], None]
"""Puts a copy on a stream: tables of addresses (int64, on the GPU) of sources and destinations, ids of the pages, and
their length in bytes."""


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

        def launch(stream: Any, sources: Any, destinations: Any, ids: PageIds, length: int) -> None:
            # Read by the kernel where they lie: a copy of them would be one more thing to start and to wait for.
            pointers = [ctypes.c_uint64(t.data_ptr()) for t in (sources, destinations, ids.pinned)]
            counts = [ids.num_regions, ids.num_blocks, length, self.chunk_bytes, self.num_stages]
            num_blocks = min(self.num_blocks, ids.num_pages)
            kernel.launch(num_blocks, 32, stream.cuda_stream, [*pointers, *map(ctypes.c_int, counts)])

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

        def launch(stream: Any, sources: Any, destinations: Any, ids: PageIds, length: int) -> None:
            tiles_per_page = -(-length // self.tile_bytes)
            with torch.cuda.stream(stream):
                copy_pages_kernel[(min(self.num_programs, tiles_per_page * ids.num_pages),)](
                    sources,
                    destinations,
                    ids.pinned.to(sources.device, non_blocking=True),
                    ids.num_regions,
                    ids.num_blocks,
                    length // 16,
                    tiles_per_page,
                    TILE_WORDS=self.tile_bytes // WORD_BYTES,
                    num_warps=self.num_warps,
                )

        return launch


def default_shape(device: Any) -> BulkShape | TileShape:
    return BulkShape() if torch.cuda.get_device_capability(device) >= (9, 0) else TileShape()
