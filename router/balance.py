"""When an engine should change its role: one pure function of what the two pools have to do.

A pool's pressure is what it has to do as a share of what it should have at most; the settings say what 1 stands for.
An engine is moved to a pool at 1 or more from one that would stay at CALM or less without it. Between the two lies the
hysteresis: for the way back, the pool that gave the engine away must have twice as much to do as it had then.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from router.types import Role

CALM = 0.5


@dataclass(frozen=True, slots=True)
class PoolLoad:
    num_engines: int  # that take requests
    pressure: float | None  # None if the engines don't tell


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds."""

    hold: float  # that a pool must be in need without a break
    cooldown: float  # after a flip


@dataclass(frozen=True, slots=True)
class History:
    """What `decide` has to know of before."""

    needed: Role | None = None
    since: float = 0.0  # when `needed` began
    flipped_at: float = float("-inf")


def needed_role(prefill: PoolLoad, decode: PoolLoad) -> Role | None:
    """The role that one engine more should have. Decode comes first: without KV cache, streams stop."""
    for role, needy, giver in ((Role.DECODE, decode, prefill), (Role.PREFILL, prefill, decode)):
        if needy.pressure is None or giver.pressure is None or giver.num_engines < 2:
            continue
        without_one = giver.pressure * giver.num_engines / (giver.num_engines - 1)
        if needy.pressure >= 1 and without_one <= CALM:
            return role
    return None


def decide(
    now: float, prefill: PoolLoad, decode: PoolLoad, history: History, patience: Patience
) -> tuple[Role | None, History]:
    """The role to give to an engine of the other pool right now, None for none; and the history for the next call."""
    needed = needed_role(prefill, decode)
    if needed is not history.needed:
        history = replace(history, needed=needed, since=now)
    is_due = now - history.since >= patience.hold and now - history.flipped_at >= patience.cooldown
    if needed is None or not is_due:
        return None, history
    return needed, History(flipped_at=now)
