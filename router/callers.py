"""Who asks, and what they are entitled to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Priority(IntEnum):
    """Of two requests that wait, the one with the smaller number goes first."""

    HIGH = 0
    NORMAL = 1
    LOW = 2

    @property
    def label(self) -> str:
        """The word for it in headers, key files and metrics."""
        return self.name.lower()


PRIORITIES = {priority.label: priority for priority in Priority}


@dataclass(frozen=True, slots=True)
class Caller:
    """One API key's owner, or everybody at once where no key is needed.

    `id` tells callers apart, over a reload of the key file too. It is derived from the key and never shown.
    """

    id: bytes
    name: str | None  # None for a key without a name; logs and metrics then don't tell it from others
    priority: Priority = Priority.NORMAL  # of a request that does not say
    highest: Priority = Priority.NORMAL  # that a request may ask for
    weight: float = 1.0  # share of the engines relative to other callers' while requests wait
    max_requests: int | None = None  # in the router at once; None is the setting's
    is_admin: bool = False  # sees every request, may drain engines


# Without a key file nobody can be told from anybody else: all share one queue, and nothing is hidden from them.
ANONYMOUS = Caller(b"", "anonymous", highest=Priority.HIGH, is_admin=True)
