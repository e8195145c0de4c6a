"""GPUs are played by this process's own memory: what maps another process's memory, and what copies, is replaced."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kv_transfer import path
from kv_transfer.direct import agent, driver
from kv_transfer.direct.driver import Segment
from kv_transfer.direct.ids import AnyIds
from kv_transfer.direct.pages import PageList
from kv_transfer.direct.transfer import Telemetry


class HostTransfer:
    """Done when it has been asked about it twice."""

    def __init__(self, num_bytes: int, num_pages: int) -> None:
        self.num_bytes, self.num_pages, self.num_polls, self.was_waited_for = num_bytes, num_pages, 0, False

    def is_done(self) -> bool:
        self.num_polls += 1
        return self.num_polls > 2

    def wait(self) -> None:
        self.was_waited_for = True

    def telemetry(self) -> Telemetry:
        return Telemetry(1.0, 2.0, self.num_bytes, self.num_pages)


class HostCopier:
    """Copies pages of this process's memory."""

    def __init__(self, device: Any) -> None:
        self.device = torch.device("cpu")

    def start(
        self, sources: PageList, source_ids: AnyIds, destinations: PageList, destination_ids: AnyIds
    ) -> HostTransfer:
        num_bytes = 0
        for source, destination in zip(np.asarray(source_ids), np.asarray(destination_ids), strict=True):
            length = int(destinations.lengths[destination])
            assert length == int(sources.lengths[source])
            ctypes.memmove(int(destinations.addresses[destination]), int(sources.addresses[source]), length)
            num_bytes += length
        return HostTransfer(num_bytes, len(source_ids))


@dataclass
class HostMemory:
    """What the driver is asked.

    Attributes:
        open: how often each segment is mapped now.
    """

    open: dict[int, int] = field(default_factory=dict)

    def export(self, address: int) -> Segment:
        return Segment(address & ~0xFFF, 1 << 30, b"handle")

    def open_segment(self, segment: Segment) -> int:
        self.open[segment.base] = self.open.get(segment.base, 0) + 1
        return segment.base

    def close_segment(self, address: int) -> None:
        self.open[address] -= 1

    @property
    def num_open(self) -> int:
        return sum(self.open.values())


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostMemory]:
    memory = HostMemory()
    make_path = path.make_path
    device = SimpleNamespace(type="cuda")
    monkeypatch.setattr(path, "make_path", lambda settings, nixl: make_path(replace(settings, device=device), nixl))
    monkeypatch.setattr(path, "PageCopier", HostCopier)
    monkeypatch.setattr(agent, "_GPU_MEMORY", "DRAM")
    monkeypatch.setattr(driver, "context", lambda device: nullcontext())
    monkeypatch.setattr(driver, "gpu_uuid", lambda device: "GPU-host")
    for name in ("export", "open_segment", "close_segment"):
        monkeypatch.setattr(driver, name, getattr(memory, name))
    yield memory
