"""The engines' answers are given here."""

from __future__ import annotations

from typing import Any

import pytest

from bench.transfer.compare import Plan
from bench.transfer.first_token import OFFER
from bench.transfer.next_turn import _row, _turn, compare_next_turns, next_turn_table

KEPT = {**OFFER, "do_remote_decode": False, "do_remote_prefill": True, "remote_block_ids": [[1, 2]]}
OFFERED = {"remote_block_ids": [[3, 4]]}


class Side:
    """Answers one order after the other, and remembers them."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.orders: list[tuple[Any, ...]] = []

    def ask(self, *order: Any) -> Any:
        self.orders.append(order)
        return self.answers.pop(0)


def sides(num_bytes: float = 1e9, computed: int = 5) -> tuple[Any, Any]:
    """A prefill and a decode engine of one turn."""
    generated = (0.25, [(computed, None)], 9.0)
    prefill = Side((100.0, 0.0), (0.02, [(5, OFFERED)], 7.0), (100.0 + num_bytes, 0.0), generated)
    decode = Side((0.3, [(1, None)], 1.0), (0.01, [(2, KEPT)], 2.0), (0.03, [(5, None)], 8.0))
    return prefill, decode


def test_the_prefill_engine_is_offered_what_the_decode_engine_keeps_and_the_decode_engine_what_comes_of_it() -> None:
    prefill, decode = sides()
    turn = _turn(prefill, decode, 8192, 512, 3)
    assert (turn.keep, turn.pulled, turn.computed, turn.num_bytes, turn.is_equal) == (0.01, 0.02, 0.25, 1e9, True)
    assert decode.orders == [
        ("generate", 1, 8192, 3, None),
        ("generate", 1, 8193, 3, [OFFER]),
        ("generate", 1, 8704, 3, [OFFERED]),
    ]
    [(*_, [offer]), (*_, computes)] = [order for order in prefill.orders if order[0] == "generate"]
    assert offer == {**KEPT, "do_remote_decode": True, "do_remote_prefill": False}
    assert computes is None


def test_a_row_holds_medians_and_counts_what_is_asked_of_the_decode_engine() -> None:
    turns = [_turn(*sides(computed=computed), 8192, 512, 0) for computed in (5, 5, 6)]
    row = _row(Plan(), "direct", 8192, 512, turns)
    assert (row.keep_ms, row.pulled_ms, row.computed_ms, row.ratio) == (10.0, 20.0, 250.0, 8.33)
    assert (row.gigabytes_pulled, row.equal_tokens, row.repeats) == (1.0, 0.667, 3)
    assert "8.33" in next_turn_table([row])


def test_a_prefill_engine_that_pulled_nothing_ends_the_comparison() -> None:
    with pytest.raises(RuntimeError, match="pulled nothing of 8192 tokens"):
        _turn(*sides(num_bytes=0), 8192, 512, 0)


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (Plan(paths=("stock",), cases=((1, 8192),)), "does not pull back"),
        (Plan(paths=("direct",), cases=((1, 8192), (8, 8192))), "of 8x8192 there are more"),
    ],
)
def test_what_can_not_be_compared_is_refused(plan: Plan, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        next(compare_next_turns(plan, 512, print))
