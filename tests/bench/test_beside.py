"""The engines' answers, and their clock, are given here."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from bench.transfer.beside import WAYS, _row, _watch, beside_table, compare_beside
from bench.transfer.compare import Plan
from bench.transfer.engine import Engine, Watched
from bench.transfer.first_token import OFFER

KEPT = {**OFFER, "remote_block_ids": [[1, 2]]}
PEER = {"remote_engine_id": "p", "remote_host": "127.0.0.1", "remote_port": 1, "tp_size": 1}
WATCHED = Watched([0.006] * 3, [0.006, 0.008], [0.008] * 3, 0.5)


class Side:
    """Answers by the name of the order, and remembers all."""

    def __init__(self, log: list[Any], name: str) -> None:
        self.log, self.name = log, name

    def ask(self, *order: Any) -> Any:
        self.tell(*order)
        return self.answer()

    def tell(self, *order: Any) -> None:
        self.log.append((self.name, *order))

    def answer(self) -> Any:
        _, order, *_ = next(one for one in reversed(self.log) if one[0] == self.name)
        return {"peer": PEER, "generate": (0.2, [(5, KEPT)], 7.0), "watch": WATCHED}[order]


def orders(way: str) -> list[Any]:
    log: list[Any] = []
    prefill: Any = Side(log, "prefill")
    decode: Any = Side(log, "decode")
    assert _watch(prefill, decode, way, 1, 1024, 3) is WATCHED
    return [(side, order, arguments[-1]) for side, order, *arguments in log if arguments]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def test_what_each_way_asks_of_both_engines() -> None:
    assert orders("nothing") == [("decode", "watch", None)]
    assert orders("elsewhere") == [("decode", "watch", None), ("prefill", "generate", None)]
    assert orders("afterwards") == [("prefill", "generate", [OFFER]), ("decode", "watch", [KEPT])]
    (decode, _, [ahead]), (prefill, _, [streams]) = orders("streamed")
    assert (decode, prefill) == ("decode", "prefill"), "the decode engine has it first"
    assert ahead["tknp_stream"] == streams["tknp_lease_id"] and streams["tknp_stream"] is True
    assert ahead["do_remote_prefill"] is True and ahead["remote_engine_id"] == "p"


def test_what_is_lost_is_what_exceeds_the_time_between_tokens_before_and_after() -> None:
    slow = Watched([0.006] * 3, [0.006, 0.020], [0.008] * 3, 0.7)
    row = _row("direct", "streamed", 1, 1024, 15, 2048, [WATCHED, WATCHED, slow])
    assert (row.bare_itl_ms, row.itl_ms, row.most_itl_ms) == (7.0, 7.0, 20.0)
    assert (row.lost_ms, row.least_lost_ms, row.most_lost_ms) == (0.0, 0.0, 12.0)
    assert (row.shared_ms, row.repeats) == (500.0, 3)
    assert "streamed" in beside_table([row]) and WAYS[-1] == "streamed"


def test_a_connector_that_can_not_stream_is_refused() -> None:
    with pytest.raises(ValueError, match="does not stream"):
        next(compare_beside(Plan(paths=("stock",)), 15, print))


class Clocked:
    """An engine whose steps take 10 ms, or 30 where a prompt is under way, whose first token comes with its third.

    Attributes:
        backlog: steps that were taken before anybody looked.
    """

    def __init__(self, backlog: int, num_tokens: int = 10_000) -> None:
        self.now, self.backlog, self.left, self.under_way = 100.0, backlog, num_tokens, 0

    def add_request(self, request_id: str, *_: Any) -> None:
        self.request_id, self.under_way = request_id, 3

    def step(self) -> list[Any]:
        self.left -= 1
        found = [SimpleNamespace(request_id="stream-0", finished=self.left == 0)]
        self.now += 0.0001 if self.backlog > 0 else 0.03 if self.under_way else 0.01
        self.backlog -= 1
        self.under_way -= bool(self.under_way)
        if not self.under_way and hasattr(self, "request_id"):
            found.append(SimpleNamespace(request_id=self.request_id, finished=True))
        return found


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[[Clocked, list[Any] | None], Watched]:
    def watch(clocked: Clocked, offers: list[Any] | None) -> Watched:
        monkeypatch.setattr(time, "perf_counter", lambda: clocked.now)
        one: Any = Engine.__new__(Engine)
        one._llm, one._num_ids, one._num_watched = SimpleNamespace(llm_engine=clocked), 100, 0
        found: Watched = one.watch(0.3, 0.1, 1, 8, 0, offers)
        return found

    return watch


def test_times_between_tokens_are_told_apart_by_the_prompts_coming_and_its_first_token(watched: Any) -> None:
    found = watched(Clocked(backlog=100), [{}])
    assert found.before == pytest.approx([0.01] * 20), "what had waited to be looked at is left out"
    assert found.during == pytest.approx([0.03, 0.03, 0.03, 0.01])
    assert found.after == pytest.approx([0.01] * 9)
    assert found.shared == pytest.approx(0.09)


def test_without_a_prompt_the_same_times_go_on(watched: Any) -> None:
    found = watched(Clocked(backlog=0), None)
    assert {round(gap, 6) for gap in found.during} == {0.01}
    assert found.shared == pytest.approx(1.81, abs=0.011)


def test_streams_that_ended_too_soon_are_no_measurement(watched: Any) -> None:
    with pytest.raises(RuntimeError, match="measure fewer repeats"):
        watched(Clocked(backlog=0, num_tokens=50), None)
