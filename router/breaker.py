"""Takes an engine out of the choice when request after request fails on it."""

from __future__ import annotations

import time
from collections.abc import Callable

HOLD_SECONDS = 1.0
MAX_HOLD_SECONDS = 30.0


class CircuitBreaker:
    """Open after `threshold` failures in a row, for at least a while that doubles each time.

    It is closed by a generation of the health check's, so that no client's request has to try out whether the engine
    works again; the while starts anew once a client's request has ended well.
    """

    def __init__(self, threshold: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._threshold = threshold
        self._clock = clock
        self._num_failures = 0  # in a row
        self._hold = HOLD_SECONDS
        self._open_until = 0.0

    @property
    def is_open(self) -> bool:
        return self._num_failures >= self._threshold

    def failed(self) -> bool:
        """A client's request failed; whether this opened the breaker."""
        self._num_failures += 1
        if self._num_failures != self._threshold:
            return False
        self._open_until = self._clock() + self._hold
        self._hold = min(2 * self._hold, MAX_HOLD_SECONDS)
        return True

    def succeeded(self) -> None:
        """A client's request ended well."""
        self._num_failures = 0
        self._hold = HOLD_SECONDS

    def proved(self) -> None:
        """The engine has just generated something for the health check."""
        if self.is_open and self._clock() >= self._open_until:
            self._num_failures = 0
