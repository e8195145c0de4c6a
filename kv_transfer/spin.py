"""How a worker waits for its engine's next step. A patch of vLLM, since nothing public reaches there.

vLLM's worker spins for a second after each message of its engine, and sleeps only then (SpinCondition in
distributed/device_communicators/shm_broadcast.py). An engine that has nothing but leases steps now and then, to hear
who has read them, so its workers would spin for as long as a lease lasts. Between such steps they sleep after some
milliseconds: the message that ends the sleep comes some tens of microseconds later.

Not at once, because the socket that wakes them holds one notification and looks only every millisecond or so whether
that has gone (ZMQ_SNDHWM, and max_command_delay in libzmq): that of a message right behind another is dropped, and
would be missed for vLLM's 5 s. And not for long, since nothing says that it can't be dropped later.
"""

from __future__ import annotations

import time
from typing import Any

SPIN_SECONDS = 0.004
SLEEP_MS = 100

_is_resting = False


def install() -> None:
    """For this process's worker."""
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    if SpinCondition.record_read is _record_read:
        return
    wait = SpinCondition.wait

    def wait_shortly(condition: Any, timeout_ms: int | None = None) -> None:
        """As vLLM's, whose caller looks for a message each time that it returns."""
        wait(condition, min(timeout_ms or SLEEP_MS, SLEEP_MS) if _is_resting else timeout_ms)

    SpinCondition.record_read = _record_read
    SpinCondition.wait = wait_shortly


def rest(is_resting: bool) -> None:
    """Whether the engine's next message is to be waited for asleep, from the one after this on."""
    global _is_resting
    _is_resting = is_resting


def _record_read(condition: Any) -> None:
    """As vLLM's, or nearly as long ago as it spins."""
    condition.last_read = time.monotonic() - (condition.busy_loop_s - SPIN_SECONDS if _is_resting else 0.0)
