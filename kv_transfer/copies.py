"""What the copies of one request's KV cache have brought so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NO_PATH = "none"
"""Path of what was not copied at all."""


_PATHS = (NO_PATH, "direct", "packed", "nixl")


def path_of(*paths: str) -> str:
    """Of copies that took several."""
    return max(paths, key=_PATHS.index, default=NO_PATH)


@dataclass(frozen=True)
class Copies:
    """Attributes:
    seconds: of the longest; they run at the same time.
    path: the last in this order that any of them took: `direct`, `packed`, `nixl`.
    """

    kv_bytes: int = 0
    num_copies: int = 0
    seconds: float = 0.0
    path: str = NO_PATH

    def and_those(self, stats: Mapping[str, Sequence[Any]], first: int) -> Copies:
        """With the copies from the index `first` on in a rank's statistics (TransferStats.data)."""
        sizes, paths = stats["bytes_transferred"][first:], stats["transfer_path"][first:]
        known = [self.path] if self.num_copies else []
        return Copies(
            kv_bytes=self.kv_bytes + sum(sizes),
            num_copies=self.num_copies + len(sizes),
            seconds=max([self.seconds, *stats["transfer_duration"][first:]]),
            path=path_of(*known, *paths),
        )
