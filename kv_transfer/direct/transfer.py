"""Pulls: lists of pages copied into this GPU's memory, on a stream of their own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kv_transfer.direct import driver
from kv_transfer.direct.launch import BulkShape, TileShape, default_shape
from kv_transfer.direct.pages import Ids, PageList, RegionIds


@dataclass(frozen=True)
class Telemetry:
    """What vLLM asks of a finished transfer, by NIXL's names; times in microseconds."""

    postDuration: float
    xferDuration: float
    totalBytes: int
    descCount: int
    path: str = "direct"  # this and the next are ours; NIXL's has none
    wireBytes: int | None = None  # that crossed, where these are not all


class StreamWork:
    """What was put on a stream up to a moment."""

    def __init__(self, end: Any) -> None:
        self._end = end

    def is_done(self) -> bool:
        """Raises RuntimeError if CUDA failed."""
        return bool(self._end.query())

    def wait(self) -> None:
        self._end.synchronize()


class PageTransfer(StreamWork):
    """One copy that was started."""

    def __init__(self, begin: Any, end: Any, num_bytes: int, num_pages: int, post_seconds: float, kept: Any) -> None:
        super().__init__(end)
        self._begin = begin
        self._num_bytes, self._num_pages, self._post_seconds = num_bytes, num_pages, post_seconds
        self._kept = kept  # what the GPU reads until the end

    def telemetry(self) -> Telemetry:
        """Of a finished one."""
        return Telemetry(
            postDuration=self._post_seconds * 1e6,
            xferDuration=self._begin.elapsed_time(self._end) * 1e3,
            totalBytes=self._num_bytes,
            descCount=self._num_pages,
        )


class PageCopier:
    """Copies pages into one GPU's memory, in the order asked for, beside what the model computes."""

    def __init__(self, device: Any, shape: BulkShape | TileShape | None = None) -> None:
        self.device = torch.device(device)
        with driver.context(self.device):
            self._launch = (shape or default_shape(self.device)).load()
        self._stream = torch.cuda.Stream(self.device)

    def start(
        self, sources: PageList, source_ids: Ids | RegionIds, destinations: PageList, destination_ids: Ids | RegionIds
    ) -> PageTransfer:
        """Copies page `source_ids[i]` of `sources` to page `destination_ids[i]` of `destinations`, for all i; no
        destination may be written by anybody else until it is done."""
        started = time.perf_counter()
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            tables = sources.table(self.device), destinations.table(self.device)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(self._stream)
            ids = self._on_gpu(source_ids, destination_ids)
            num_bytes = 0
            for length, positions in destinations.by_length(destination_ids):
                chosen = positions if isinstance(positions, slice) else torch.from_numpy(positions)
                from_ids, to_ids = (row[chosen] for row in ids)
                self._launch(*tables, from_ids, to_ids, length)
                num_bytes += length * len(to_ids)
            end.record(self._stream)
        seconds = time.perf_counter() - started
        return PageTransfer(begin, end, num_bytes, len(source_ids), seconds, ids)

    def _on_gpu(self, sources: Ids | RegionIds, destinations: Ids | RegionIds) -> Any:
        """`[2, num_pages]`, by one copy and one kernel, for each of which the host takes tens of microseconds."""
        if isinstance(sources, RegionIds) and isinstance(destinations, RegionIds):
            num_regions = len(sources.offsets)
            if num_regions == len(destinations.offsets):
                there = self._copied(sources.offsets, sources.blocks, destinations.offsets, destinations.blocks)
                return (there[:, :num_regions, None] + there[:, None, num_regions:]).view(2, -1)
        return self._copied(np.asarray(sources), np.asarray(destinations))

    def _copied(self, *parts: Any) -> Any:
        """Half of them in each of two rows."""
        # Torch keeps it until it was read.
        pinned = torch.empty(sum(map(len, parts)), dtype=torch.int32, pin_memory=True)
        # By numpy: torch wakes a thread per core to copy more than 32,768 of them, which takes 4 ms on 64 cores.
        np.concatenate(parts, out=pinned.numpy())
        return pinned.to(self.device, non_blocking=True).view(2, -1)

    def run(self, work: Callable[[], None]) -> StreamWork:
        """Starts what `work` asks of torch, after all that was started before."""
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            work()
            end = torch.cuda.Event()
            end.record(self._stream)
        return StreamWork(end)
