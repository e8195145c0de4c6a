"""Hand-overs between real schedulers, connectors and NIXL agents (tests/kv_transfer/pair.py), and what can go wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kv_transfer.identity import OFFER_PARAM
from tests.kv_transfer.pair import BYTES_PER_BLOCK, Pair, prompt, run
from tests.services.building import BLOCK_SIZE
from tests.soak.handovers import Fate, hand_over


@pytest.fixture
def pair(llama: Path, alone: None) -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def make(prefill: dict[str, Any] | None = None, decode: dict[str, Any] | None = None) -> Pair:
        made.append(Pair(llama, prefill or {}, decode or {}))
        return made[-1]

    yield make
    for one in made:
        one.decode.shutdown()
        one.prefill.shutdown()


@pytest.fixture(scope="module")
def both(llama: Path, alone: None) -> Iterator[Pair]:
    """Engines for the tests that need nothing special of them."""
    made = Pair(llama, {}, {})
    yield made
    made.decode.shutdown()
    made.prefill.shutdown()


def test_kv_that_was_held_to_the_end_is_used(both: Pair) -> None:
    for i, length in enumerate((1, BLOCK_SIZE, 100, 300)):
        tokens = prompt(length, i)
        assert both.hand_over(tokens, both.offer(tokens)) == 1, "the last token alone"
    assert both.settle() == []


def test_a_lease_that_ends_before_the_pull_costs_a_prefill(both: Pair) -> None:
    tokens = prompt(100, 1)
    params = both.offer(tokens)
    both.lose(params)
    assert both.hand_over(tokens, params) == 100
    assert both.settle() == ["lease_ended"]
    again = prompt(90, 2)
    assert both.hand_over(again, both.offer(again)) == 1, "the next one is pulled"
    assert both.settle() == []


def test_a_lease_that_ends_during_the_pull_costs_a_prefill(both: Pair) -> None:
    tokens = prompt(100, 1)
    params = both.offer(tokens)
    lost = []

    def lose() -> None:
        if any(worker.connector_worker._recving_transfers for worker in both.decode.workers):
            both.decode.on_poll = lambda: None
            both.lose(params)
            lost.append(True)

    both.decode.on_poll = lose
    assert both.hand_over(tokens, params) == 100
    assert lost and both.settle() == ["lease_ended"]


def test_an_engine_in_the_place_of_the_one_that_offered_is_told_from_it(both: Pair) -> None:
    """The table is where it was, with another epoch in it."""
    tokens = prompt(100, 1)
    params = both.offer(tokens)
    params[OFFER_PARAM]["tables"] = [[0, 0, params[OFFER_PARAM]["tables"][0][2], "1"]]
    assert both.hand_over(tokens, params) == 100
    both.lose(params)
    assert both.settle() == ["other_engine"]


def test_an_offer_for_another_prompt_is_not_even_pulled(both: Pair) -> None:
    pulled = len(both.decode.stats["pull_bytes"])
    assert both.hand_over(prompt(100, 2), both.offer(prompt(100, 1))) == 100
    assert both.settle() == ["other_prompt"]
    assert len(both.decode.stats["pull_bytes"]) == pulled


@pytest.mark.parametrize("nonsense", [7, {}, {"slot": "x"}, {"slot": -1, "generation": 0, "prompt": "", "tables": []}])
def test_an_offer_that_no_engine_made_does_no_harm(both: Pair, nonsense: Any) -> None:
    tokens = prompt(100, 1)
    assert both.hand_over(tokens, {**both.offer(tokens), OFFER_PARAM: nonsense}) >= 1
    both.settle()


def test_all_sequences_of_a_request_read_one_offer(both: Pair) -> None:
    tokens = prompt(100, 1)
    params = {**both.offer(tokens), "tknp_num_readers": 3}
    for i in range(3):
        assert both.prefill.num_free_blocks < both.prefill.num_usable_blocks, "the last one has not read yet"
        both.hand_over(tokens, params, index=f"{i}_")
    assert both.settle() == []


def test_a_released_lease_is_over(both: Pair) -> None:
    tokens = prompt(100, 1)
    params = both.offer(tokens, tknp_lease_id="lease")
    both.prefill.step()
    both.prefill.workers[0].release_lease("lease")
    run(both.prefill, until=both.prefill.is_idle)
    both.prefill.overwrite()
    assert both.hand_over(tokens, params) == 100
    assert both.settle() == ["lease_ended"]


def test_what_the_rank_has_already_does_not_cross_again(both: Pair) -> None:
    del both.decode.stats["pull_bytes"][:]
    shared = prompt(5 * BLOCK_SIZE, 1)
    for i in range(4):
        tokens = shared + prompt(40, 10 + i)
        both.hand_over(tokens, both.offer(tokens))
    assert both.decode.stats["pull_bytes"] == [7 * BYTES_PER_BLOCK] + [2 * BYTES_PER_BLOCK] * 3
    whole = shared[: 4 * BLOCK_SIZE]
    both.hand_over(whole, both.offer(whole))
    assert sum(both.decode.stats["pull_bytes"]) <= 14 * BYTES_PER_BLOCK, "one block at most for the last token"
    assert both.settle() == []


def test_a_slot_s_next_lease_is_not_the_one_that_was_offered(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kv_transfer.identity.NUM_SLOTS", 1)
    both = pair()
    tokens, others = prompt(100, 1), prompt(100, 2)
    params = both.offer(tokens)
    assert both.offer(others) is None, "there is no other slot"
    both.prefill.lose_lease(params["remote_request_id"])
    next_params = both.offer(others)
    assert next_params[OFFER_PARAM]["slot"] == params[OFFER_PARAM]["slot"]
    assert both.hand_over(tokens, params) == 100
    assert both.hand_over(others, next_params) == 1
    assert both.settle() == ["lease_ended"]


def test_a_stock_prefill_engine_is_read_while_its_lease_is_sure_to_last(pair: Callable[..., Pair]) -> None:
    both = pair(prefill={"connector": "NixlConnector"})
    tokens = prompt(100, 1)
    params = both.offer(tokens)
    assert OFFER_PARAM not in params
    assert both.hand_over(tokens, params) == 1
    assert both.settle() == []
    # What the decode engine assumes of the lease; nothing tells it of the other's.
    both.decode.scheduler.connector.connector_scheduler._kv_lease_duration = 0
    assert both.hand_over(tokens, both.offer(tokens)) == 100
    assert both.settle() == ["too_late"]


def test_our_prefill_engine_feeds_a_stock_decode_engine(pair: Callable[..., Pair]) -> None:
    both = pair(decode={"connector": "NixlConnector", "num_blocks": [60]})
    tokens = prompt(100, 1)
    assert both.hand_over(tokens, both.offer(tokens)) == 1
    both.settle()


def test_larger_blocks_on_the_decode_side(pair: Callable[..., Pair]) -> None:
    both = pair(decode={"block_size": 2 * BLOCK_SIZE})
    for i, length in enumerate((20, 64, 100, 129, 300)):
        tokens = prompt(length, i)
        assert both.hand_over(tokens, both.offer(tokens)) == 1
    shared = prompt(4 * BLOCK_SIZE, 7)
    for i, length in enumerate((20, 40, 200)):  # the second and the third find the shared blocks here
        tokens = shared + prompt(length, i)
        assert both.hand_over(tokens, both.offer(tokens)) == 1
    assert both.settle() == []


def test_an_engine_that_was_introduced_is_connected_before_the_first_request(pair: Callable[..., Pair]) -> None:
    both = pair()
    engine_id = both.prefill.config.kv_transfer_config.engine_id
    for worker in both.decode.workers:
        worker.connect_peer(engine_id, "127.0.0.1", both.prefill.port, tp_size=1, dcp_size=1, pp_size=1)
        handshake = worker.connector_worker._handshake_futures.get(engine_id)
        assert handshake is not None
        handshake.result(20)
        worker.connector_worker._handshake_initiation_executor.shutdown()  # there is no other
    tokens = prompt(100, 1)
    assert both.hand_over(tokens, both.offer(tokens)) == 1
    assert both.settle() == []


@pytest.mark.parametrize("block_size", [BLOCK_SIZE, 2 * BLOCK_SIZE])
def test_checksums_find_a_block_that_is_not_as_it_was(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch, block_size: int
) -> None:
    monkeypatch.setenv("TKNP_KV_CHECKSUMS", "1")
    both = pair(decode={"block_size": block_size})
    for i, length in enumerate((20, 100, 300)):
        tokens = prompt(length, i)
        assert both.hand_over(tokens, both.offer(tokens)) == 1
    tokens = prompt(100, 9)
    params = both.offer(tokens)
    both.prefill.step()
    both.prefill.workers[0].cache["layers.1"][params["remote_block_ids"][0][1], 2, 5, 7] += 4096.0
    assert both.hand_over(tokens, params) == 100
    assert both.settle() == ["checksum"]


def test_a_thousand_hand_overs_that_end_in_every_phase(llama: Path, alone: None) -> None:
    summary = hand_over(1000, llama)
    assert summary["left"] == [], summary
    assert set(summary["fates"]) == set(Fate)
    assert summary["stale"]["lease_ended"] > 50 and summary["pulls"] > 300
