"""The engines' answers are given here."""

from __future__ import annotations

from typing import Any

import pytest

from bench.transfer.compare import Plan
from bench.transfer.first_token import (
    OFFER,
    _bare_step,
    _Engines,
    _first_requests,
    _hand_over,
    _measure,
    compare_first_tokens,
    first_token_table,
)

KEPT = {**OFFER, "remote_block_ids": [[1, 2]]}
PEER = {"remote_engine_id": "p", "remote_host": "127.0.0.1", "remote_port": 1}


class Engine:
    """Answers as an engine whose requests take `seconds`, from the first to the last; a prefill engine's end at 7.0 s,
    a decode engine's at 7.004 s."""

    def __init__(self, seconds: list[float], end: float, num_bytes: float = 0.0) -> None:
        self.seconds, self.end, self.num_bytes = list(seconds), end, num_bytes
        self.pulled = 0.0
        self.orders: list[tuple[Any, ...]] = []

    def ask(self, *order: Any) -> Any:
        self.orders.append(order)
        if order[0] == "kv_bytes":
            return self.pulled, 0.0
        if order[0] != "generate":
            return PEER
        _, requests, _, _, params, *_ = order
        if params:
            self.pulled += self.num_bytes
        seconds = self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]
        return seconds, [(5, KEPT)] * requests, self.end

    def tell(self, *order: Any) -> None:
        self.told = order

    def answer(self) -> Any:
        return self.ask(*self.told)


def engines(is_ahead: bool, prefills: int = 1, decode: list[float] | None = None) -> Any:
    sides: Any = [Engine([0.2], 7.0) for _ in range(prefills)]
    reader: Any = Engine(decode or [0.01], 7.004, num_bytes=1e9)
    return _Engines("direct", sides, reader, is_ahead)


def test_a_request_that_the_decode_engine_gets_afterwards_counts_from_when_it_gets_it() -> None:
    pair = engines(is_ahead=False, decode=[0.015, 0.012])
    run = _hand_over(pair, 1, 1024, 3)
    assert (run.seconds, run.prefill_seconds, run.resident_seconds, run.equal_tokens) == (0.015, 0.2, 0.012, 1.0)
    offered, resident = [order for order in pair.decode.orders if order[0] == "generate"]
    assert offered == ("generate", 1, 1024, 3, [KEPT])
    assert resident == ("generate", 1, 1025, 3, None), "as many tokens as it computes of one that was pulled"
    assert pair.prefill.orders == [("generate", 1, 1024, 3, [OFFER])]


def test_a_request_that_the_decode_engine_has_before_counts_from_the_prefill_engines_answer() -> None:
    pair = engines(is_ahead=True)
    run = _hand_over(pair, 1, 1024, 3)
    assert run.seconds == pytest.approx(0.004)
    [ahead] = pair.decode.told[4]
    [streams] = [order[4] for order in pair.prefill.orders if order[0] == "generate"]
    assert ahead["tknp_stream"] == streams[0]["tknp_lease_id"] == "direct-1-1024-3-0"
    assert ahead["remote_engine_id"] == "p" and streams[0]["tknp_stream"] is True


def test_a_bare_step_computes_one_token() -> None:
    pair = engines(is_ahead=False, decode=[0.03, 0.01, 0.03, 0.02, 0.03, 0.05])
    assert _bare_step(pair, 0) == 0.02
    assert [order[2] for order in pair.decode.orders] == [64, 65] * 3
    assert len({order[3] for order in pair.decode.orders}) == 3, "the 65th token alone is not there yet"


def test_each_prefill_engine_has_a_first_request_and_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.transfer.first_token._CONNECT_SECONDS", 0.0)
    # Warm-up (2 x 2), bare steps (3 x 2), and of eight requests each the hand-over and what is resident.
    each = [0.018, 0.01] + [0.014, 0.01] * 7
    pair = engines(is_ahead=False, prefills=2, decode=[0.01] * 10 + each + each)
    for first, later in _first_requests(pair):
        assert first == pytest.approx(0.008) and later == pytest.approx(0.004)
    asked = [order[3] for order in pair.decode.orders if order[0] == "generate" and order[4]]
    assert len(asked) == len(set(asked)) == 16, "none was here before"
    assert [order[0] for order in pair.decode.orders].count("meet") == 2


def test_a_row_says_how_it_was_measured() -> None:
    plan = Plan(cases=((1, 8192),), repeats=3, ahead=True, sources=2)
    [row] = _measure(plan, [engines(is_ahead=True)], 1, 8192, {"direct": [(0.003, 0.001), (0.002, 0.001)]})
    assert row.ahead and row.streamed_chunk == 0 and row.repeats == 3
    assert row.bare_step_ms == 10.0 and row.first_token_ms == pytest.approx(-6.0)
    assert (row.first_ms, row.later_ms, row.first_beyond_later_ms) == (2.5, 1.0, [2.0, 1.0])
    assert "8192" in first_token_table([row])


@pytest.mark.parametrize("plan", [Plan(ahead=True), Plan(streamed_chunk=2048)])
def test_vllms_own_connector_is_not_asked_for_what_it_does_not_do(plan: Plan) -> None:
    with pytest.raises(ValueError, match="pulls only after prefill"):
        next(compare_first_tokens(plan, print))


def test_streaming_and_not_streaming_are_not_asked_for_at_once() -> None:
    with pytest.raises(ValueError, match="not both"):
        next(compare_first_tokens(Plan(paths=("direct",), ahead=True, streamed_chunk=2048), print))
