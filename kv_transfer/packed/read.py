"""A packed read, between the thread that asked for it and the one that does it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from kv_transfer.direct.ids import Ids
from kv_transfer.direct.pages import PageList
from kv_transfer.direct.transfer import Telemetry
from kv_transfer.packed.copier import Work


class PeerLostError(RuntimeError):
    """A prefill worker does not answer any more; it has to be shaken hands with again."""


class PackedRead:
    """See kv_transfer.detour.Read.

    Attributes:
        source_ids, destination_ids: numbers of pages, each of the first for the one of the second at its place.
        works: what takes its pages out of slots.
    """

    def __init__(
        self, peer: str, notification: bytes, source_ids: Ids, destinations: PageList, destination_ids: Ids
    ) -> None:
        self.peer = peer
        self.notification = notification
        self.source_ids = source_ids
        self.destinations = destinations
        self.destination_ids = destination_ids
        self.works: list[Work] = []
        self._error: Exception | None = None
        self._is_cancelled = False
        self._num_parts = self._num_left = -1
        self._wire_bytes = 0
        self._begun = self._ended = 0.0
        self._deciding = threading.Lock()

    # -- the one that asked --

    def post(self) -> None:
        self._begun = time.perf_counter()

    def is_done(self) -> bool:
        """Raises what kept it from being done."""
        if self._error is not None:
            raise self._error
        return self._num_left == 0

    @property
    def is_pending(self) -> bool:
        """Whether there is something to wait for."""
        return self._error is None and self._num_left != 0

    def cancel(self) -> None:
        """Nothing is written to its pages after this."""
        with self._deciding:
            self._is_cancelled = True
        for work in self.works:
            work.wait()

    def telemetry(self) -> Telemetry:
        """Of one that is done."""
        return Telemetry(
            postDuration=0.0,
            xferDuration=(self._ended - self._begun) * 1e6,
            totalBytes=int(self.destinations.lengths[self.destination_ids].sum()),
            descCount=self._num_parts,
            path="packed",
            wireBytes=self._wire_bytes,
        )

    # -- the one that does it --

    @property
    def is_over(self) -> bool:
        """Whether nobody waits for the rest."""
        return self._is_cancelled or self._error is not None

    def begin(self, num_parts: int, wire_bytes: int) -> None:
        self._num_parts, self._wire_bytes = num_parts, wire_bytes
        self._num_left = num_parts

    @contextmanager
    def unpacking(self) -> Iterator[bool]:
        """While pages may be written to; whether they may."""
        with self._deciding:
            yield not self.is_over

    def finish_part(self) -> None:
        self._ended = time.perf_counter()
        self._num_left -= 1

    def fail(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
