"""Pulls: lists of pages copied into this GPU's memory, on a stream of their own."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kv_transfer.direct import driver
from kv_transfer.direct.ids import AnyIds, PageIds
from kv_transfer.direct.launch import BulkShape, TileShape, default_shape
from kv_transfer.direct.pages import PageList


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

    def __init__(self, begin: Any, end: Any, num_bytes: int, num_pages: int, post_seconds: float) -> None:
        super().__init__(end)
        self._begin = begin
        self._num_bytes, self._num_pages, self._post_seconds = num_bytes, num_pages, post_seconds

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
        self._starting = threading.Lock()
        # Of events, what kernels read until then, and torch, which doesn't know of them, must not give to others.
        self._read: deque[tuple[Any, list[Any]]] = deque()

    def start(
        self, sources: PageList, source_ids: AnyIds, destinations: PageList, destination_ids: AnyIds
    ) -> PageTransfer:
        """Copies page `source_ids[i]` of `sources` to page `destination_ids[i]` of `destinations`, for all i; no
        destination may be written by anybody else until it is done."""
        started = time.perf_counter()
        with self._starting, torch.cuda.device(self.device):
            while self._read and self._read[0][0].query():
                self._read.popleft()
            tables = sources.table(self.device), destinations.table(self.device)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            num_bytes, read = 0, list[Any](tables)
            begin.record(self._stream)
            try:
                for length, mask in destinations.by_length(destination_ids):
                    read.append(ids := PageIds.of(source_ids, destination_ids, mask))
                    self._launch(self._stream, *tables, ids, length)
                    num_bytes += length * ids.num_pages
            finally:
                end.record(self._stream)
                self._read.append((end, read))
        return PageTransfer(begin, end, num_bytes, len(source_ids), time.perf_counter() - started)

    def run(self, work: Callable[[], None]) -> StreamWork:
        """Starts what `work` asks of torch, after all that was started before."""
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            work()
            end = torch.cuda.Event()
            end.record(self._stream)
        return StreamWork(end)
