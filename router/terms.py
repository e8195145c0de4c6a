"""What a client's headers ask of admission."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from router.callers import PRIORITIES, Caller, Priority
from router.errors import InvalidRequest

if TYPE_CHECKING:
    from starlette.types import Scope

PRIORITY_HEADER = b"x-request-priority"
TIMEOUT_HEADER = b"x-request-timeout"
MAX_TIMEOUT = 86_400  # s


@dataclass(frozen=True, slots=True)
class Terms:
    caller: Caller
    priority: Priority
    deadline: float | None  # by the event loop's clock


def read_terms(scope: Scope) -> Terms:
    """To be called when a request arrives: its deadline counts from now. Raises InvalidRequest."""
    caller: Caller = scope["state"]["caller"]
    priority, deadline = caller.priority, None
    for name, value in scope["headers"]:
        if name == TIMEOUT_HEADER:
            deadline = asyncio.get_running_loop().time() + _seconds(value)
        elif name == PRIORITY_HEADER:
            priority = max(_priority(value), caller.highest)  # nobody is served before what the key is good for
    return Terms(caller, priority, deadline)


def _seconds(value: bytes) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_TIMEOUT:  # nan is not, either
        raise InvalidRequest(f"X-Request-Timeout must be seconds, above 0 and at most {MAX_TIMEOUT}. Send a number.")
    return seconds


def _priority(value: bytes) -> Priority:
    found = PRIORITIES.get(value.decode("latin-1").lower())
    if found is None:
        raise InvalidRequest(f"X-Request-Priority must be one of {', '.join(PRIORITIES)}.")
    return found
