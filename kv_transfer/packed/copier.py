"""Copies pages in the host's memory, as kv_transfer.direct.transfer.PageCopier does in a GPU's."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Protocol

import torch

from kv_transfer.direct.ids import Ids
from kv_transfer.direct.pages import PageList


class Work(Protocol):
    """Something started."""

    def is_done(self) -> bool:
        """Raises RuntimeError if it failed."""

    def wait(self) -> None:
        """Until it is done."""


class Copier(Protocol):
    """What can move pages in one device's memory, one thing after the other."""

    device: Any

    def start(self, sources: PageList, source_ids: Ids, destinations: PageList, destination_ids: Ids) -> Work:
        """Copies page `source_ids[i]` to page `destination_ids[i]`, for all i."""

    def run(self, work: Callable[[], None]) -> Work:
        """Starts what `work` asks of torch, after all that was started before."""


class Done:
    """Work that took the time of its start."""

    def is_done(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class HostCopier:
    """See the module."""

    device = torch.device("cpu")

    def start(self, sources: PageList, source_ids: Ids, destinations: PageList, destination_ids: Ids) -> Done:
        rows = zip(
            destinations.addresses[destination_ids].tolist(),
            sources.addresses[source_ids].tolist(),
            sources.lengths[source_ids].tolist(),
            strict=True,
        )
        for destination, source, length in rows:
            ctypes.memmove(destination, source, length)
        return Done()

    def run(self, work: Callable[[], None]) -> Done:
        work()
        return Done()
