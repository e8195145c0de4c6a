"""How often, and how soon, a failed leg is tried again on another engine."""

from __future__ import annotations

import random

BASE_SECONDS = 0.05
MAX_SECONDS = 1.0


def backoff(num_failed: int) -> float:
    """Seconds before the next attempt after `num_failed` (>= 1): exponential with full jitter, so that the requests of
    an engine that died don't arrive at the next one together.

    Source: "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    return random.uniform(0, min(MAX_SECONDS, BASE_SECONDS * 2 ** (num_failed - 1)))


class RetryBudget:
    """Lets retries after anything but an engine's death be a share of all requests: they can't multiply an overload.

    Each request puts `ratio` of a retry in, each retry takes one out; `reserve` is there from the start and the most
    that ever is, so that a quiet router can still retry. Source: Finagle's RetryBudget.
    """

    def __init__(self, ratio: float, reserve: int) -> None:
        self._ratio = ratio
        self._reserve = float(reserve)
        self._left = float(reserve)

    def deposit(self) -> None:
        """A request has come."""
        self._left = min(self._reserve, self._left + self._ratio)

    def withdraw(self) -> bool:
        """Whether a retry may be made; if so it counts."""
        if self._left < 1:
            return False
        self._left -= 1
        return True
