"""The sides' answers are given here; tests/kv_transfer/direct runs them."""

from __future__ import annotations

from typing import Any

import pytest

from bench.shapes import SHAPES
from bench.transfer import compare
from bench.transfer.compare import BeyondLinkError, Pair, Plan, WrongBlocksError
from bench.transfer.process import Served, ready
from bench.transfer.side import Pulled

PLAN = Plan(shape="8b", cases=((2, 1024),), repeats=3)
SIZE = 2 * 1024 * SHAPES["8b"].kv_bytes_per_token


class Side:
    """Answers every pull with the next of these."""

    def __init__(self, *pulled: Pulled) -> None:
        self.pulled = list(pulled)
        self.lists: list[list[list[int]]] = []

    def ask(self, order: str, *arguments: Any) -> Any:
        if order == "offer":
            self.lists.append(arguments[1])
        return self.pulled.pop(0) if order == "pull" else [{} for _ in range(8)]


def measured(*seconds: float, wrong: int = 0) -> tuple[list[compare.Row], Side]:
    answers = [Pulled(0.1, 0)]
    for _ in (False, True):
        answers += [Pulled(1.0, wrong), *(Pulled(s, None) for s in seconds)]
    prefill: Any = Side()
    decode: Any = Side(*answers)
    return list(compare._measure(PLAN, "direct", Pair(prefill, decode), lambda _: None)), prefill


def test_rows_hold_medians_of_what_was_not_compared_at_the_same_time() -> None:
    rows, _ = measured(0.002, 0.001, 0.004)
    assert [(row.fragmented, row.seconds, row.repeats, row.first_ms) for row in rows] == [
        (False, 0.002, 3, 100.0),
        (True, 0.002, 3, 100.0),
    ]
    assert rows[0].gigabytes_per_second == round(SIZE / 0.002 / 1e9, 1)
    assert rows[0].handover_ms == pytest.approx((0.002 - SIZE / 450e9) * 1e3, abs=1e-3)
    assert "direct" in compare.table(rows)


def test_what_beats_the_link_was_not_copied() -> None:
    with pytest.raises(BeyondLinkError, match=r"direct, 2 x 1024 tokens: 4\d\d GB/s, but the link gives 450"):
        measured(0.002, SIZE / 460e9, 0.002)


def test_wrong_bytes_end_the_comparison() -> None:
    with pytest.raises(WrongBlocksError, match="5 blocks hold other bytes"):
        measured(0.002, 0.002, 0.002, wrong=5)


def test_requests_have_blocks_of_their_own_in_order_or_not() -> None:
    _, prefill = measured(0.002, 0.002, 0.002)
    first, *_, last = prefill.lists[1:]
    assert first == [list(range(1, 65)), list(range(65, 129))]
    used = [block for ids in last for block in ids]
    assert len(set(used)) == 128 and 0 not in used and max(used) < PLAN.num_blocks
    assert used != sorted(used)


def _echo(job: str, pipe: Any) -> None:
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        pipe.send((job, *order))


def _crash(job: str, pipe: Any) -> None:
    raise SystemExit(job)


def test_an_order_goes_to_the_process_and_back() -> None:
    served = Served("echo", _echo, "job")
    with ready(served):
        assert served.ask("offer", 7) == ("job", "offer", 7)
    assert not served._process.is_alive()


def test_a_process_that_ends_is_named() -> None:
    with (
        pytest.raises(RuntimeError, match="the stock kv_producer side ended"),
        ready(Served("stock kv_producer side", _crash, "no GPU")),
    ):
        pass
