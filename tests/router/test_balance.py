from __future__ import annotations

import pytest

from router.balance import History, Patience, PoolLoad, decide, needed_role
from router.types import Role

PATIENCE = Patience(hold=30, cooldown=120)
BUSY, CALM = PoolLoad(2, 1.2), PoolLoad(3, 0.1)


@pytest.mark.parametrize(
    ("prefill", "decode", "role"),
    [
        (BUSY, CALM, Role.PREFILL),
        (CALM, BUSY, Role.DECODE),
        (CALM, CALM, None),
        (BUSY, BUSY, None),  # more engines are what helps, not other roles
        (BUSY, PoolLoad(1, 0.0), None),  # nobody left
        (BUSY, PoolLoad(3, 0.33), Role.PREFILL),  # 0.495 on the two that stay
        (BUSY, PoolLoad(3, 0.34), None),  # 0.51
        (PoolLoad(2, 1.0), CALM, Role.PREFILL),
        (PoolLoad(2, 0.99), CALM, None),
        (PoolLoad(2, None), BUSY, None),  # engines that don't tell
        (BUSY, PoolLoad(3, None), None),
        (PoolLoad(0, None), CALM, None),
    ],
)
def test_which_pool_needs_an_engine(prefill: PoolLoad, decode: PoolLoad, role: Role | None) -> None:
    assert needed_role(prefill, decode) is role


def test_a_flip_never_calls_for_the_way_back() -> None:
    """Whatever the loads were: after the engine was moved and the work spread anew, nobody needs it back."""
    for num_prefill in range(1, 6):
        for num_decode in range(1, 6):
            for tenths in range(60):
                for other in range(60):
                    prefill, decode = PoolLoad(num_prefill, tenths / 10), PoolLoad(num_decode, other / 10)
                    role = needed_role(prefill, decode)
                    if role is None:
                        continue
                    moved = 1 if role is Role.PREFILL else -1
                    after_prefill, after_decode = num_prefill + moved, num_decode - moved
                    after = (
                        PoolLoad(after_prefill, tenths / 10 * num_prefill / after_prefill),
                        PoolLoad(after_decode, other / 10 * num_decode / after_decode),
                    )
                    assert needed_role(*after) in (role, None)


def run(*loads: tuple[float, PoolLoad, PoolLoad]) -> list[float]:
    """When it flipped."""
    history, flips = History(), []
    for now, prefill, decode in loads:
        role, history = decide(now, prefill, decode, history, PATIENCE)
        if role is not None:
            flips.append(now)
    return flips


def test_a_need_must_last_and_a_flip_must_work_first() -> None:
    assert run(*((now, BUSY, CALM) for now in range(300))) == [30, 150, 270]


def test_a_burst_flips_nothing() -> None:
    assert run(*((now, BUSY if now % 30 else CALM, CALM) for now in range(300))) == []
