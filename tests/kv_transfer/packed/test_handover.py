"""Packed KV between real connectors, over real side channels and NIXL agents (tests/kv_transfer/pair.py)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kv_transfer import packed, path
from kv_transfer.packed import packer, puller
from kv_transfer.packed.fp8 import HeadShape, round_trip
from kv_transfer.packed.path import PackedSettings
from tests.kv_transfer.pair import BYTES_PER_BLOCK, HEAD_SIZE, HEADS, Engine, Pair, prompt, run
from tests.services.building import BLOCK_SIZE, MAX_MODEL_LEN
from tests.soak.handovers import hand_over

PACKED: dict[str, Any] = {
    "kv_transfer_path": "packed",
    "kv_transfer_staging_bytes": packed.NUM_SLOTS * 2 * BYTES_PER_BLOCK,
}
"""Slots of two blocks."""


@pytest.fixture
def pair(llama: Path, alone: None) -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def make(prefill: dict[str, Any] | None = None, decode: dict[str, Any] | None = None) -> Pair:
        made.append(Pair(llama, prefill or PACKED, PACKED if decode is None else decode))
        return made[-1]

    yield make
    for one in made:
        one.decode.shutdown()
        one.prefill.shutdown()


@pytest.fixture(scope="module")
def both(llama: Path, alone: None) -> Iterator[Pair]:
    made = Pair(llama, PACKED, PACKED)
    yield made
    made.decode.shutdown()
    made.prefill.shutdown()


def pulls(engine: Engine) -> Any:
    return engine.workers[0].connector_worker


def packer_of(both: Pair) -> Any:
    [way] = pulls(both.prefill)._path._ways
    return way._packer


def test_every_block_arrives_in_a_few_reads_of_many_pages(both: Pair) -> None:
    lengths = (1, BLOCK_SIZE, 100, 300, MAX_MODEL_LEN - 4)
    for i, length in enumerate(lengths):
        tokens = prompt(length, i)
        assert both.hand_over(tokens, both.offer(tokens)) == 1, "the last token alone"
    assert both.settle() == []
    stats = both.decode.stats
    assert stats["transfer_path"] == ["packed"] * len(lengths)
    blocks = [-(-length // BLOCK_SIZE) for length in lengths]
    assert stats["bytes_transferred"] == stats["wire_bytes"] == [n * BYTES_PER_BLOCK for n in blocks]
    # 16 blocks fill all slots there are; a read takes two of them, of all layers.
    assert stats["num_descriptors"] == [-(-n // 2) for n in blocks] and max(blocks) == 16
    assert all(seconds > 0 for seconds in stats["transfer_duration"])


def test_larger_blocks_on_the_decode_side(pair: Callable[..., Pair]) -> None:
    both = pair(decode={**PACKED, "block_size": 2 * BLOCK_SIZE})
    for i, length in enumerate((20, 129, 300)):
        tokens = prompt(length, i)
        assert both.hand_over(tokens, both.offer(tokens)) == 1
    assert both.settle() == []
    assert set(both.decode.stats["transfer_path"]) == {"packed"}


def test_hand_overs_that_end_in_every_phase(llama: Path, alone: None) -> None:
    summary = hand_over(250, llama, **PACKED)
    assert summary["left"] == [], summary
    assert set(summary["paths"]) == {"packed"}
    assert summary["stale"]["lease_ended"] > 5 and summary["pulls"] > 60


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline, "not reached in 20 s"
        time.sleep(0.01)


def test_slots_are_free_again_when_their_readers_have_gone(pair: Callable[..., Pair]) -> None:
    both = pair()
    tokens = prompt(300, 1)
    assert both.hand_over(tokens, both.offer(tokens)) == 1
    served = packer_of(both)
    reader = next(peer for peer in served._readers if served._readers[peer].pages)
    # It orders and is never heard of again.
    ids = np.arange(2, dtype=np.int32).tobytes()
    for number in range(packed.NUM_SLOTS + 3):
        served._later(served._order)(reader, {"order": 1000 + number, "ids": ids})
    wait_for(lambda: not served._free)
    both.decode.shutdown()
    wait_for(lambda: len(served._free) == packed.NUM_SLOTS and not served._readers and not served._orders)


def test_a_prefill_worker_that_dies_while_it_packs_costs_a_prefill_and_is_connected_anew(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = pair()
    tokens = prompt(300, 1)
    assert both.hand_over(tokens, both.offer(tokens)) == 1
    served = packer_of(both)
    monkeypatch.setattr(served, "_pack", lambda *_: served._channel.close())  # in the midst of an order
    others = prompt(300, 2)
    assert both.hand_over(others, both.offer(others)) == 300
    assert not all(worker.connector_worker._remote_agents for worker in both.decode.workers), "to be shaken hands with"
    wait_for(lambda: not any(w.connector_worker._path.agent._puller._peers for w in both.decode.workers))


def test_a_prefill_worker_that_does_not_answer_costs_a_prefill_and_no_slot(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(puller, "ORDER_SECONDS", 1.0)
    monkeypatch.setattr(packer, "ORDER_SECONDS", 1.0)
    monkeypatch.setattr(packer, "SLOT_SECONDS", 2.0)
    monkeypatch.setattr(packer, "_NUDGE_SECONDS", 0.1)
    both = pair()
    served = packer_of(both)
    answer, served._channel.send = served._channel.send, lambda *_: None
    tokens = prompt(300, 1)
    params = both.offer(tokens)
    monkeypatch.setattr(puller, "_OPEN_SECONDS", 0.3)
    assert both.hand_over(tokens, params) == 300, "it never opened"
    both.lose(params)
    served._channel.send = answer
    tokens = prompt(300, 2)
    assert both.hand_over(tokens, both.offer(tokens)) == 1
    served._channel.send = lambda *_: None
    tokens = prompt(300, 3)
    params = both.offer(tokens)
    assert both.hand_over(tokens, params) == 300, "it packed, and did not say so"
    both.lose(params)
    served._channel.send = answer
    wait_for(lambda: len(served._free) == packed.NUM_SLOTS)
    tokens = prompt(300, 4)
    assert both.hand_over(tokens, both.offer(tokens)) == 1
    for worker in both.decode.workers:
        reader = worker.connector_worker._path.agent._puller
        assert reader._staging is None or len(reader._free) == packed.NUM_SLOTS


def test_compressed_blocks_are_what_fp8_makes_of_them(pair: Callable[..., Pair]) -> None:
    both = pair(decode={**PACKED, "kv_transfer_compression": "fp8", "num_blocks": [60]})
    tokens = prompt(300, 1)
    params = both.offer(tokens)
    shape = HeadShape(1, BLOCK_SIZE * HEAD_SIZE, "float32")
    [source] = params["remote_block_ids"]
    sent = {name: round_trip(cache[source], shape) for name, cache in both.prefill.workers[0].cache.items()}
    both.decode._compute = lambda request_id, num_tokens: compare(request_id)  # type: ignore[method-assign]
    compared: list[bool] = []

    def compare(request_id: str) -> list[int]:
        _, [blocks] = both.decode._place(request_id)
        caches = both.decode.workers[0].cache.items()
        compared.append(all(cache[blocks[: len(source)]].equal(sent[name]) for name, cache in caches))
        return [1]

    both.decode.add("d", tokens, 1, dict(params))
    run(both.prefill, both.decode, until=lambda: "d" in both.decode.answered)
    assert compared == [True]
    [wire], [whole] = both.decode.stats["wire_bytes"], both.decode.stats["bytes_transferred"]
    assert whole == len(source) * BYTES_PER_BLOCK
    assert wire == whole // 4 + len(source) * len(sent) * HEADS * 2 * 4, "a byte an element, and the scales"


def test_a_stock_prefill_engine_is_read_through_nixl_unless_packing_is_asked_for(pair: Callable[..., Pair]) -> None:
    tokens = prompt(100, 1)
    both = pair({"connector": "NixlConnector"}, {"kv_transfer_path": "auto"})
    assert both.hand_over(tokens, both.offer(tokens)) == 1
    assert both.decode.stats["transfer_path"] == ["nixl"]
    forced = pair({"connector": "NixlConnector"})
    assert forced.hand_over(tokens, forced.offer(tokens)) == 100
    assert "pull_bytes" not in forced.decode.stats or not forced.decode.stats["pull_bytes"]


def settings(wanted: str = "auto", compression: str = "none", device: Any = None) -> path.PathSettings:
    reads = PackedSettings("127.0.0.1", False, True, 1 << 20, ["UCX"], values_follow=True)
    return path.PathSettings(wanted, compression, device, reads)


HOST = torch.device("cpu")


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        (settings("rdma"), "kv_transfer_path is one of auto, direct, packed, nixl, not 'rdma'"),
        (settings("direct", device=HOST), "kv_transfer_path=direct needs"),
        (settings("packed"), "kv_transfer_path=packed needs"),
        (settings(compression="int4", device=HOST), "kv_transfer_compression is one of none, fp8, not 'int4'"),
        (settings("nixl", "fp8", HOST), "kv_transfer_compression=fp8 needs kv_transfer_path=packed or auto"),
    ],
)
def test_settings_that_cannot_be_had_are_refused_at_start(wanted: path.PathSettings, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        path.make_path(wanted, object())


def test_bits_cannot_be_compared_with_what_is_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TKNP_KV_CHECKSUMS", "1")
    with pytest.raises(ValueError, match="compares bits"):
        path.make_path(settings(compression="fp8", device=HOST), object())


def test_where_nixl_is_asked_for_nothing_stands_before_it() -> None:
    agent = object()
    assert path.make_path(settings("nixl", device=HOST), agent).agent is agent
