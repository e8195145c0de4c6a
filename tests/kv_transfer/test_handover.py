"""Hand-overs between real schedulers, connectors and NIXL agents (tests/kv_transfer/pair.py), and what can go wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kv_transfer.identity import OFFER_PARAM
from tests.kv_transfer.pair import HEAD_SIZE, HEADS, LAYERS, Engine, prompt, run, world
from tests.services.building import BLOCK_SIZE, tiny_config

BYTES_PER_BLOCK = LAYERS * HEADS * BLOCK_SIZE * 2 * HEAD_SIZE * 4


class Pair:
    """One prefill and one decode engine with two ranks."""

    def __init__(self, model: Path, prefill: dict[str, Any], decode: dict[str, Any]) -> None:
        self.prefill = Engine(model, "kv_producer", **{"num_blocks": [60], **prefill})
        self.decode = Engine(model, "kv_consumer", **{"num_blocks": [40, 40], **decode})

    def offer(self, name: str, prompt: list[int]) -> Any:
        """The prefill leg: what the prefill engine answers."""
        self.prefill.prefill(name, prompt)
        run(self.prefill, until=lambda: name in self.prefill.answered)
        return self.prefill.answered[name]

    def hand_over(self, name: str, prompt: list[int], params: Any) -> int:
        """The decode leg, to its end. Returns how many tokens the decode engine computed of the prompt."""
        self.decode.add(name, prompt, 3, params)
        run(self.prefill, self.decode, until=lambda: name in self.decode.answered)
        return self.decode.computed[name] - 2

    def settle(self) -> None:
        """Returns once nothing is held on either side."""
        run(self.prefill, self.decode, until=lambda: self.prefill.is_idle() and self.decode.is_idle())
        for engine in (self.prefill, self.decode):
            assert engine.num_free_blocks == engine.num_usable_blocks

    @property
    def stale(self) -> list[str]:
        return self.decode.stats.get("stale_reason", [])


@pytest.fixture(scope="module")
def alone(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the played model is small
    with world(tiny_config(llama, pulls_kv=True), tmp_path_factory.mktemp("world")):
        yield
    torch.set_num_threads(threads)


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


def test_kv_that_was_held_to_the_end_is_used(pair: Callable[..., Pair]) -> None:
    both = pair()
    for i, length in enumerate((1, BLOCK_SIZE, 100, 300)):
        tokens = prompt(length, i)
        assert both.hand_over(f"d{i}", tokens, both.offer(f"p{i}", tokens)) == 1, "the last token alone"
    both.settle()
    assert both.stale == []


def test_a_lease_that_ends_before_the_pull_costs_a_prefill(pair: Callable[..., Pair]) -> None:
    both = pair()
    tokens = prompt(100, 1)
    params = both.offer("p", tokens)
    both.prefill.lose_lease("p")
    both.prefill.overwrite()
    assert both.hand_over("d", tokens, params) == 100
    assert both.stale == ["lease_ended"]
    both.settle()
    again = prompt(90, 2)
    assert both.hand_over("d2", again, both.offer("p2", again)) == 1, "the next one is pulled"
    both.settle()


def test_a_lease_that_ends_during_the_pull_costs_a_prefill(pair: Callable[..., Pair]) -> None:
    both = pair()
    warm = prompt(40, 9)
    both.hand_over("warm", warm, both.offer("p-warm", warm))  # so that the reads are posted in the first step
    tokens = prompt(100, 1)
    params = both.offer("p", tokens)

    def lose() -> None:
        if any(worker.connector_worker._recving_transfers for worker in both.decode.workers):
            both.decode.on_poll = lambda: None
            both.prefill.lose_lease("p")
            both.prefill.overwrite()
            lost.append(True)

    lost: list[bool] = []
    both.decode.on_poll = lose
    assert both.hand_over("d", tokens, params) == 100
    assert lost and both.stale == ["lease_ended"]
    both.settle()


def test_an_engine_in_the_place_of_the_one_that_offered_is_told_from_it(
    pair: Callable[..., Pair],
) -> None:
    """The table is where it was, with another epoch in it."""
    both = pair()
    tokens = prompt(100, 1)
    params = both.offer("p", tokens)
    both.prefill.workers[0].connector_worker._lease_table.rows[:, 0] += 1
    assert both.hand_over("d", tokens, params) == 100
    assert both.stale == ["other_engine"]
    both.prefill.lose_lease("p")
    both.settle()


def test_an_offer_for_another_prompt_is_not_even_pulled(pair: Callable[..., Pair]) -> None:
    both = pair()
    params = both.offer("p", prompt(100, 1))
    assert both.hand_over("d", prompt(100, 2), params) == 100
    assert both.stale == ["other_prompt"]
    both.settle()
    assert "pull_bytes" not in both.decode.stats or not both.decode.stats["pull_bytes"]


def test_an_offer_that_no_engine_made_does_no_harm(pair: Callable[..., Pair]) -> None:
    both = pair()
    tokens = prompt(100, 1)
    for i, nonsense in enumerate((7, {}, {"slot": "x"}, {"slot": -1, "generation": 0, "prompt": "", "tables": []})):
        params = {**both.offer(f"p{i}", tokens), OFFER_PARAM: nonsense}
        assert both.hand_over(f"d{i}", tokens, params) >= 1
    both.settle()


def test_all_sequences_of_a_request_read_one_offer(pair: Callable[..., Pair]) -> None:
    both = pair()
    tokens = prompt(100, 1)
    params = {**both.offer("p", tokens), "tknp_num_readers": 3}
    for i in range(3):
        assert both.prefill.num_free_blocks < both.prefill.num_usable_blocks, "the last one has not read yet"
        both.hand_over(f"{i}_d", tokens, dict(params))
    both.settle()
    assert both.stale == []


def test_a_released_lease_is_over(pair: Callable[..., Pair]) -> None:
    both = pair()
    tokens = prompt(100, 1)
    both.prefill.prefill("p", tokens, tknp_lease_id="lease")
    run(both.prefill, until=lambda: "p" in both.prefill.answered)
    both.prefill.step()
    both.prefill.workers[0].release_lease("lease")
    run(both.prefill, until=both.prefill.is_idle)
    both.prefill.overwrite()
    assert both.hand_over("d", tokens, both.prefill.answered["p"]) == 100
    assert both.stale == ["lease_ended"]
    both.settle()


def test_a_slot_s_next_lease_is_not_the_one_that_was_offered(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kv_transfer.identity.NUM_SLOTS", 1)
    both = pair()
    tokens, others = prompt(100, 1), prompt(100, 2)
    params = both.offer("p", tokens)
    both.prefill.lose_lease("p")
    next_params = both.offer("p2", others)
    assert next_params[OFFER_PARAM]["slot"] == params[OFFER_PARAM]["slot"]
    assert both.hand_over("d", tokens, params) == 100
    assert both.hand_over("d2", others, next_params) == 1
    assert both.stale == ["lease_ended"]
    both.settle()


def test_without_a_free_slot_nothing_is_offered(pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kv_transfer.identity.NUM_SLOTS", 1)
    both = pair()
    tokens = prompt(100, 1)
    params = both.offer("p", tokens)
    assert both.offer("p2", prompt(100, 2)) is None
    assert both.hand_over("d", tokens, params) == 1
    both.settle()


def test_a_stock_prefill_engine_is_read_while_its_lease_is_sure_to_last(pair: Callable[..., Pair]) -> None:
    both = pair(prefill={"connector": "NixlConnector"})
    tokens = prompt(100, 1)
    params = both.offer("p", tokens)
    assert OFFER_PARAM not in params
    assert both.hand_over("d", tokens, params) == 1
    both.settle()


def test_a_stock_prefill_engine_s_kv_is_not_used_when_it_comes_too_late(pair: Callable[..., Pair]) -> None:
    """With the lease that the decode engine assumes; nothing else tells it of the other's."""
    both = pair(prefill={"connector": "NixlConnector"}, decode={"kv_lease_duration": 0})
    tokens = prompt(100, 1)
    assert both.hand_over("d", tokens, both.offer("p", tokens)) == 100
    assert both.stale == ["too_late"]
    both.settle()


def test_our_prefill_engine_feeds_a_stock_decode_engine(pair: Callable[..., Pair]) -> None:
    both = pair(decode={"connector": "NixlConnector", "num_blocks": [60]})
    tokens = prompt(100, 1)
    assert both.hand_over("d", tokens, both.offer("p", tokens)) == 1
    both.settle()


def test_what_the_rank_has_already_does_not_cross_again(pair: Callable[..., Pair]) -> None:
    both = pair()
    shared = prompt(5 * BLOCK_SIZE, 1)
    for i in range(4):
        tokens = shared + prompt(40, 10 + i)
        both.hand_over(f"d{i}", tokens, both.offer(f"p{i}", tokens))
    both.settle()
    assert both.decode.stats["pull_bytes"] == [7 * BYTES_PER_BLOCK] + [2 * BYTES_PER_BLOCK] * 3
    whole = shared[: 4 * BLOCK_SIZE]
    both.hand_over("all-here", whole, both.offer("p-all-here", whole))
    both.settle()
    assert sum(both.decode.stats["pull_bytes"]) <= 14 * BYTES_PER_BLOCK, "one block at most for the last token"


def test_larger_blocks_on_the_decode_side(pair: Callable[..., Pair]) -> None:
    both = pair(decode={"block_size": 2 * BLOCK_SIZE})
    for i, length in enumerate((20, 64, 100, 129, 300)):
        tokens = prompt(length, i)
        assert both.hand_over(f"d{i}", tokens, both.offer(f"p{i}", tokens)) == 1
    both.settle()
