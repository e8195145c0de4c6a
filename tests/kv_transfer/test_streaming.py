"""KV cache that is pulled while its prompt is computed, between real schedulers, connectors and NIXL agents."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kv_transfer.copies import Copies
from tests.kv_transfer.pair import BYTES_PER_BLOCK, LAYERS, Pair, prompt, run
from tests.services.building import BLOCK_SIZE

CHUNK = 4  # blocks that the prefill engine computes in a step


class Streams(Pair):
    """A pair whose prefill engine computes prompts in chunks."""

    def __init__(self, model: Path, num_blocks: int = 60, stream_layers: bool = False, **decode: Any) -> None:
        prefill = {"step_tokens": CHUNK * BLOCK_SIZE, "num_blocks": [num_blocks], "stream_layers": stream_layers}
        super().__init__(model, prefill, decode)

    def begin(self, tokens: list[int], other: list[int] | None = None, **params: Any) -> str:
        """Both legs, the decode leg first. Returns their number; the requests are `p` and `d` with it, and the lease
        is `l`."""
        self.num_requests += 1
        number = str(self.num_requests)
        self.decode.add(
            f"d{number}",
            other or tokens,
            3,
            {
                "do_remote_prefill": True,
                "do_remote_decode": False,
                "remote_engine_id": self.prefill.config.kv_transfer_config.engine_id,
                "remote_host": "127.0.0.1",
                "remote_port": self.prefill.port,
                "tp_size": 1,
                "tknp_stream": f"l{number}",
                **params,
            },
        )
        self.prefill.prefill(f"p{number}", tokens, tknp_lease_id=f"l{number}", tknp_stream=True)
        return number

    def num_arrived(self, number: str) -> float:
        """Blocks of the decode leg; a layer of a block is a part of one."""
        workers = [worker.connector_worker for worker in self.decode.workers]
        num_bytes: int = sum(worker._pulled.get(f"d{number}", Copies()).kv_bytes for worker in workers)
        return num_bytes / BYTES_PER_BLOCK

    def chunk(self, number: str, num_arrived: float) -> None:
        """The prefill engine's next step, and what the decode engine then pulls."""
        self.prefill.step()
        run(self.decode, until=lambda: self.num_arrived(number) == num_arrived)

    def subscribe(self) -> None:
        """Steps the decode engine until it listens."""
        workers = [worker.connector_worker for worker in self.decode.workers]
        run(self.decode, until=lambda: any(one.state for worker in workers for one in worker._streamed.values()))

    def end(self, number: str) -> int:
        """Both legs to their ends. Returns how many tokens of the prompt the decode engine computed."""
        name = f"d{number}"
        run(self.prefill, self.decode, until=lambda: name in self.decode.answered)
        return self.decode.computed[name] - 2

    def taken(self, name: str) -> list[int]:
        """The decode engine's statistics since the last call."""
        values = self.decode.stats.get(name, [])
        taken, values[:] = list(values), []
        return taken


@pytest.fixture
def streams(llama: Path, alone: None) -> Iterator[Callable[..., Streams]]:
    made: list[Streams] = []

    def make(**options: Any) -> Streams:
        made.append(Streams(llama, **options))
        return made[-1]

    yield make
    for one in made:
        one.decode.shutdown()
        one.prefill.shutdown()


@pytest.fixture(scope="module")
def both(llama: Path, alone: None) -> Iterator[Streams]:
    made = Streams(llama)
    yield made
    made.decode.shutdown()
    made.prefill.shutdown()


def test_each_chunk_crosses_while_the_next_is_computed(both: Streams) -> None:
    number = both.begin(prompt(4 * CHUNK * BLOCK_SIZE - 5, 1))
    for i in range(1, 4):
        both.chunk(number, i * CHUNK)
    assert both.end(number) == 1
    assert both.taken("pull_bytes") == [4 * CHUNK * BYTES_PER_BLOCK]
    assert both.taken("pull_hidden_bytes") == [3 * CHUNK * BYTES_PER_BLOCK]
    assert both.settle() == []
    assert not both.prefill.stats.get("num_notifications_after_expiry"), "it is told of the last pull alone"


def test_prompts_of_all_lengths(both: Streams) -> None:
    for i, length in enumerate((1, BLOCK_SIZE, 100, CHUNK * BLOCK_SIZE, 300, 500)):
        assert both.end(both.begin(prompt(length, i))) == 1
    assert both.settle() == []


def test_what_is_here_already_does_not_cross(both: Streams) -> None:
    shared = prompt(6 * BLOCK_SIZE, 1)
    both.end(both.begin(shared + prompt(40, 2)))
    both.taken("pull_bytes")
    number = both.begin(shared + prompt(6 * BLOCK_SIZE, 3))
    both.chunk(number, 4)  # six of the first two chunks' ten blocks are here, and there too
    assert both.end(number) == 1
    assert both.taken("pull_bytes") == [6 * BYTES_PER_BLOCK]
    assert both.settle() == []


def test_a_decode_leg_that_comes_late_finds_the_offer(both: Streams) -> None:
    tokens = prompt(300, 1)
    add, legs = both.decode.add, []
    both.decode.add = lambda *leg: legs.append(leg)  # type: ignore[method-assign]
    number = both.begin(tokens)
    both.decode.add = add  # type: ignore[method-assign]
    run(both.prefill, until=lambda: f"p{number}" in both.prefill.answered)
    add(*legs[0])
    assert both.end(number) == 1
    assert both.settle() == []


def test_a_preempted_prefill_begins_again(streams: Callable[..., Streams]) -> None:
    both = streams(num_blocks=10)
    both.prefill.add("other", prompt(2 * BLOCK_SIZE - 1, 2), 40, {})
    number = both.begin(prompt(7 * BLOCK_SIZE - 5, 1))
    both.chunk(number, 2)
    both.chunk(number, 6)
    both.prefill.step()
    assert both.prefill.scheduler.requests[f"p{number}"].num_preemptions == 1, "the other one took the last block"
    assert both.end(number) == 1
    assert both.taken("pull_bytes") == [(6 + 7) * BYTES_PER_BLOCK]
    assert both.settle() == []


def test_a_prefill_that_is_aborted_costs_the_decode_engine_a_prefill(both: Streams) -> None:
    tokens = prompt(500, 1)
    number = both.begin(tokens)
    both.chunk(number, CHUNK)
    both.prefill.abort(f"p{number}")
    assert both.end(number) == 500
    assert both.settle() == ["stream_broken"]


def test_a_decode_leg_that_is_aborted_gives_its_blocks_back_when_nothing_writes_to_them(both: Streams) -> None:
    number = both.begin(prompt(500, 1))
    both.chunk(number, CHUNK)
    both.prefill.step()
    seen: list[int] = []

    def abort() -> None:  # a read is under way
        if not seen and any(w.connector_worker._recving_transfers.get(f"d{number}") for w in both.decode.workers):
            both.decode.abort(f"d{number}")
            seen.append(both.decode.num_free_blocks)

    both.decode.on_poll = abort
    run(both.decode, until=lambda: bool(seen) and both.decode.is_idle())
    both.decode.on_poll = lambda: None
    assert seen[0] < both.decode.num_usable_blocks, "they were not free at once"
    run(both.prefill, until=lambda: f"p{number}" in both.prefill.answered)
    both.prefill.step()
    both.prefill.workers[0].release_lease(f"l{number}")  # as the router does
    assert both.settle() == []


def test_a_lease_that_ends_during_the_last_pull_makes_all_void(both: Streams) -> None:
    number = both.begin(prompt(500, 1))
    for i in range(1, 4):
        both.chunk(number, i * CHUNK)
    lost: list[bool] = []

    def lose() -> None:
        if not lost and any(len(worker.connector_worker._checks) for worker in both.decode.workers):
            lost.append(True)
            both.lose({"remote_request_id": f"p{number}"})

    both.decode.on_poll = lose
    assert both.end(number) == 500
    both.decode.on_poll = lambda: None
    assert lost and both.settle() == ["lease_ended"]


def test_another_prompt_s_stream_is_not_used(both: Streams) -> None:
    assert both.end(both.begin(prompt(300, 1), other=prompt(300, 2))) == 300
    assert both.settle() == ["other_prompt"]


def test_a_name_that_is_taken_is_nobody_else_s(both: Streams) -> None:
    number = both.begin(prompt(300, 1))
    both.prefill.prefill("impostor", prompt(300, 2), tknp_stream=True, tknp_lease_id=f"l{number}")
    assert both.end(number) == 1
    run(both.prefill, until=lambda: "impostor" in both.prefill.answered)
    both.prefill.lose_lease("impostor")
    assert both.settle() == []


def test_what_is_refused_is_let_go_all_the_same(both: Streams) -> None:
    assert both.end(both.begin(prompt(300, 1), pp_size=2)) == 300
    assert both.settle() == []


@pytest.mark.parametrize("block_size", [BLOCK_SIZE, 2 * BLOCK_SIZE])
def test_layers_cross_while_the_next_one_is_computed(streams: Callable[..., Streams], block_size: int) -> None:
    both = streams(stream_layers=True, block_size=block_size)
    number = both.begin(prompt(4 * CHUNK * BLOCK_SIZE - 5, 1))
    both.subscribe()
    last = block_size // BLOCK_SIZE  # is not full
    counts = [CHUNK, 2 * CHUNK, 3 * CHUNK, 4 * CHUNK - last]
    due = [before + (now - before) * i / LAYERS for before, now in pairwise((0, *counts)) for i in range(1, LAYERS + 1)]

    def pull() -> None:
        num_arrived = due.pop(0)
        run(both.decode, until=lambda: both.num_arrived(number) == num_arrived)

    both.prefill.on_layer = pull
    assert both.end(number) == 1
    both.prefill.on_layer = lambda: None
    assert due == []
    assert both.taken("pull_hidden_bytes") == [counts[-1] * BYTES_PER_BLOCK]
    assert both.taken("pull_bytes") == [4 * CHUNK * BYTES_PER_BLOCK]
    for i, length in enumerate((20, 200, 9 * BLOCK_SIZE, 333)):
        assert both.end(both.begin(prompt(length, i))) == 1
    assert both.settle() == []


def test_larger_blocks_on_the_decode_side(streams: Callable[..., Streams]) -> None:
    both = streams(block_size=2 * BLOCK_SIZE)
    shared = prompt(4 * BLOCK_SIZE, 9)
    for i, length in enumerate((20, 200, 9 * BLOCK_SIZE, 333)):
        assert both.end(both.begin(shared + prompt(length, i))) == 1
    assert sum(both.taken("pull_hidden_bytes")) > 0
    assert both.settle() == []


def test_a_prefill_engine_that_dies_in_mid_stream_costs_a_prefill(streams: Callable[..., Streams]) -> None:
    both = streams()
    number = both.begin(prompt(500, 1))
    both.chunk(number, CHUNK)
    both.prefill.scheduler.connector.connector_scheduler._source.close()
    run(both.decode, until=lambda: f"d{number}" in both.decode.answered)
    assert both.decode.computed[f"d{number}"] == 502
    assert both.decode.stats["stale_reason"] == ["stream_broken"]
    assert both.decode.num_free_blocks == both.decode.num_usable_blocks


@pytest.mark.parametrize("num_chunks", [0, 1])
def test_a_stream_that_says_no_more_is_given_up(
    both: Streams, num_chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = both.begin(prompt(500, 1))
    both.subscribe()
    for _ in range(num_chunks):
        both.chunk(number, CHUNK)
    now, begun = time.monotonic, time.monotonic()
    for seconds in (0.9, 1.1):
        assert f"d{number}" in both.decode.scheduler.requests and not both.decode.stats.get("stale_reason")
        monkeypatch.setattr(time, "monotonic", lambda ahead=seconds * 30: now() + ahead)
        both.decode.step()
    assert now() - begun < 2.5, "the first of these steps came before the limit"
    monkeypatch.undo()
    run(both.decode, until=lambda: f"d{number}" in both.decode.answered)
    assert both.decode.computed[f"d{number}"] == 502
    both.prefill.abort(f"p{number}")
    assert both.settle() == ["stream_broken"]
