"""A prefill engine that pulls the beginning of a prompt from the decode rank that has it, as of a conversation's turn
before, and computes the rest; with the engines of tests/kv_transfer/pair.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlConnectorMetadata

from kv_transfer.identity import OFFER_PARAM
from kv_transfer.metadata import TokenParallelConnectorMetadata
from router.legs import PULLED_BACK
from tests.kv_transfer.pair import Engine, prompt, run
from tests.services.building import BLOCK_SIZE

NUM_ANSWERED = 70
OFFERED = (
    *("remote_engine_id", "remote_request_id", "remote_host", "remote_port", "remote_block_ids", "remote_num_tokens"),
    *("tp_size", OFFER_PARAM),
)


class Conversation:
    """A prefill engine and a decode engine of two ranks, each of which may pull from the other."""

    def __init__(self, model: Path, num_blocks: int = 40, **options: Any) -> None:
        self.prefill = Engine(model, "kv_both", num_blocks=[60 * num_blocks // 40], **options)
        self.decode = Engine(model, "kv_both", num_blocks=[num_blocks, num_blocks], **options)
        self.num_legs = 0

    def _name(self) -> str:
        self.num_legs += 1
        return f"leg-{self.num_legs}"

    def run(self, engine: Engine, name: str) -> Any:
        run(self.prefill, self.decode, until=lambda: name in engine.answered)
        return engine.answered[name]

    def turn(self, tokens: list[int], **back: Any) -> list[int]:
        """Returns the conversation with the answer. The played model's is how many tokens it has seen."""
        self.last = self.begin_turn(tokens, **back)
        self.run(self.decode, self.last)
        return tokens + [len(tokens) + i for i in range(NUM_ANSWERED)]

    def begin_turn(self, tokens: list[int], **back: Any) -> str:
        """The prefill leg, to its end, and the decode leg, which it names."""
        name = self._name()
        self.prefill.prefill(name, tokens, **back)
        self.answer = self.run(self.prefill, name)
        self.decode.add(name, tokens, NUM_ANSWERED, self.answer)
        return name

    def keep(self, tokens: list[int]) -> dict[str, Any]:
        """What a decode rank offers of these tokens, most of which it has."""
        name = self._name()
        self.decode.prefill(name, tokens)
        offer = self.run(self.decode, name)
        self.computed_to_keep = self.decode.computed[name]
        return {field: offer[field] for field in OFFERED}

    def settle(self) -> None:
        """Waits until nothing is held on either side."""
        both = (self.prefill, self.decode)
        run(*both, until=lambda: all(engine.is_idle() for engine in both), seconds=120.0)
        for engine in both:
            assert engine.num_free_blocks == engine.num_usable_blocks

    def forget_in_prefill(self) -> None:
        """What is cached there, so that all has to come from elsewhere."""
        self.settle()
        assert self.prefill.scheduler.reset_prefix_cache()

    def end_leases(self) -> None:
        """Of all ranks."""
        self.decode.step()  # the workers hear of them
        for worker in self.decode.workers:
            leases = worker.connector_worker._reqs_to_send
            leases.update(dict.fromkeys(leases, 0.0))
        self.decode.step()

    def stale(self) -> list[str]:
        return self.prefill.stats.pop("stale_reason", [])


@pytest.fixture(scope="module")
def conversation(llama: Path, alone: None) -> Iterator[Conversation]:
    made = Conversation(llama)
    yield made
    made.decode.shutdown()
    made.prefill.shutdown()


@pytest.fixture(autouse=True)
def empty(conversation: Conversation) -> Iterator[None]:
    yield
    conversation.settle()
    for engine in (conversation.prefill, conversation.decode):
        engine.scheduler.reset_prefix_cache()


def whole_blocks(tokens: list[int], more: int = 0) -> list[int]:
    """What of a conversation a decode rank keeps in full blocks; the last token's KV cache was never needed."""
    return tokens[: (len(tokens) - 1) // BLOCK_SIZE * BLOCK_SIZE + more]


def test_the_turn_before_is_pulled_from_the_rank_that_has_it(conversation: Conversation) -> None:
    beside = conversation.begin_turn(prompt(90, 7))  # takes a rank
    for seed in range(2):
        so_far = conversation.turn(prompt(100, seed))
        kept = whole_blocks(so_far, more=1 - seed)
        offer = conversation.keep(kept)
        assert conversation.computed_to_keep == (BLOCK_SIZE if seed else 1), "vLLM computes at least a token"
        conversation.turn(so_far + prompt(50, seed + 10), **offer)
        assert conversation.answer[PULLED_BACK], "so that the router need not end the lease"
        in_both = conversation.prefill.computed[conversation.last], conversation.decode.computed[conversation.last]
        assert in_both == (len(so_far) + 50 - len(kept), NUM_ANSWERED), "the decode rank pulled what is new alone"
        conversation.run(conversation.decode, beside)
    assert set(conversation.decode.stats["pull_rank"]) == {0, 1}
    assert conversation.prefill.stats["pull_path"] == ["nixl"] * 2
    assert conversation.stale() == []


def test_groups_of_layers_that_see_a_window_alone(llama: Path, alone: None) -> None:
    talking = Conversation(llama, num_blocks=80, windows=(None, 2 * BLOCK_SIZE))
    try:
        so_far = talking.turn(prompt(200, 1))
        talking.forget_in_prefill()
        kept = whole_blocks(so_far, more=1)
        talking.turn(so_far + prompt(50, 2), **talking.keep(kept))
        assert talking.prefill.computed[talking.last] == len(so_far) + 50 - len(kept)
        talking.settle()
    finally:
        talking.decode.shutdown()
        talking.prefill.shutdown()


def test_a_prefill_engine_that_has_it_all_lets_the_rank_go(conversation: Conversation) -> None:
    tokens = prompt(100, 1)
    conversation.turn(tokens)
    offer = conversation.keep(whole_blocks(tokens))
    pulls = len(conversation.prefill.stats.get("pull_path", []))
    conversation.turn(tokens, **offer)
    assert conversation.answer[PULLED_BACK]
    assert len(conversation.prefill.stats.get("pull_path", [])) == pulls


def test_a_lease_that_ended_costs_a_prefill(conversation: Conversation) -> None:
    so_far = conversation.turn(prompt(100, 2))
    conversation.forget_in_prefill()
    offer = conversation.keep(whole_blocks(so_far))
    conversation.end_leases()
    conversation.turn(so_far, **offer)
    assert conversation.prefill.computed[conversation.last] == len(so_far)
    assert conversation.stale() == ["lease_ended"]
    assert PULLED_BACK not in conversation.answer


@pytest.mark.parametrize(
    "broken",
    [
        {"remote_port": None},
        {"remote_engine_id": []},
        {"tp_size": "1"},
        {"remote_num_tokens": None},
        {"remote_block_ids": 7},
        {"remote_block_ids": [[1], [2]]},
        {"remote_block_ids": [[1, 2]]},  # fewer than its tokens
        {OFFER_PARAM: {}},
    ],
    ids=str,
)
def test_half_an_offer_costs_a_prefill(conversation: Conversation, broken: dict[str, Any]) -> None:
    so_far = conversation.turn(prompt(100, 3))
    conversation.forget_in_prefill()
    offer = conversation.keep(whole_blocks(so_far))
    conversation.turn(so_far, **{**offer, **broken})
    assert conversation.prefill.computed[conversation.last] == len(so_far)
    conversation.end_leases()


def test_another_prompts_beginning_is_not_pulled(conversation: Conversation) -> None:
    so_far = conversation.turn(prompt(100, 4))
    offer = conversation.keep(whole_blocks(so_far))
    other = prompt(300, 5)
    conversation.turn(other, **offer)
    assert conversation.prefill.computed[conversation.last] == len(other)
    assert conversation.stale() == ["other_prompt"]


def test_a_token_parallel_engine_prefills_for_others(conversation: Conversation) -> None:
    """As one does whose role was changed."""
    tokens = prompt(130, 8)
    conversation.decode.prefill("kept", tokens)
    conversation.prefill.add("read", tokens, 3, conversation.run(conversation.decode, "kept"))
    conversation.run(conversation.prefill, "read")
    assert conversation.prefill.computed["read"] == 3, "the last token of the prompt, and two of the answer"


def test_a_request_that_moves_to_another_rank_is_kept_there_alone(conversation: Conversation) -> None:
    """One that was preempted before its end."""
    processed = [worker.connector_worker._reqs_to_process for worker in conversation.decode.workers]
    for keeper in (0, 1):
        base = NixlConnectorMetadata()
        base.reqs_in_batch = {"moved"}
        for worker in conversation.decode.workers:
            orders = TokenParallelConnectorMetadata(base, {}, {}, idle=False, keepers={"moved": keeper})
            worker.bind_connector_metadata(orders)
            worker.start_load_kv(None)
            worker.clear_connector_metadata()
        assert ["moved" in of_rank for of_rank in processed] == [keeper == 0, keeper == 1]
    for of_rank in processed:
        of_rank.discard("moved")
