"""How a worker waits for its engine's next step. A patch of vLLM, since nothing public reaches there.

vLLM's worker spins for a second after each message of its engine, and sleeps only then (SpinCondition in
distributed/device_communicators/shm_broadcast.py). An engine that has nothing but leases steps now and then, to hear
who has read them, so its workers would spin for as long as a lease lasts. Between such steps they sleep at once: the
message that ends the sleep comes some tens of microseconds later.
"""

from __future__ import annotations

import time
from typing import Any

_is_resting = False


def install() -> None:
    """For this process's worker."""
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    SpinCondition.record_read = _record_read


def rest(is_resting: bool) -> None:
    """Whether the engine's next message is to be waited for asleep, from the one after this on."""
    global _is_resting
    _is_resting = is_resting


def _record_read(condition: Any) -> None:
    """As vLLM's, or long ago."""
    condition.last_read = time.monotonic() - (condition.busy_loop_s if _is_resting else 0.0)
