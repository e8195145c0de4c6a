"""Hand-overs between real schedulers, connectors and NIXL agents (tests/kv_transfer/pair.py), and what can go wrong."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import GET_META_MSG

from kv_transfer.connector import TokenParallelKVConnector
from kv_transfer.identity import OFFER_PARAM
from kv_transfer.worker import TokenParallelConnectorWorker
from tests.kv_transfer.pair import (
    BYTES_PER_BLOCK,
    Pair,
    make_latent_model,
    prompt,
    run,
)
from tests.kv_transfer.world import vllm_log
from tests.services.building import BLOCK_SIZE
from tests.soak.handovers import Fate, hand_over
from tknp.common.ports import PortError, free_port


def test_an_engine_does_not_start_where_its_port_stays_taken(both: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kv_transfer.scheduler._PORT_PATIENCE_SECONDS", 0.2)
    payloads = {(0, 0): both.prefill.workers[0].get_handshake_metadata()}
    taken = f"^port {both.prefill.port} of 127.0.0.1 is in use, and still was after 0.2 s$"
    with pytest.raises(PortError, match=taken):
        both.prefill.scheduler.connector.set_xfer_handshake_metadata_pp_aware(payloads)


def test_kv_that_was_held_to_the_end_is_used(both: Pair) -> None:
    for i, length in enumerate((1, BLOCK_SIZE, 100, 300)):
        tokens = prompt(length, i)
        assert both.hand_over(tokens, both.offer(tokens)) == 1, "the last token alone"
    assert both.settle() == []
    assert both.decode.stats["handover_path"] == both.decode.stats["pull_path"] == ["nixl"] * 4
    assert both.decode.stats["handover_rank"] == both.decode.stats["pull_rank"]
    spent = [sum(stages.values()) for stages in both.decode.stats["handover_seconds"]]
    assert all(0 < seconds < 30 for seconds in spent)


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


def test_a_rank_that_gets_its_order_late_does_not_trust_a_stock_engines_lease_for_longer(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = pair(prefill={"connector": "NixlConnector"})
    both.decode.scheduler.connector.connector_scheduler._kv_lease_duration = 1.5  # two thirds are trusted
    tokens = prompt(100, 1)
    assert both.hand_over(tokens, both.offer(tokens)) == 1
    others = prompt(100, 2)
    params = both.offer(others)
    for connector in both.decode.workers:

        def late(*args: Any, start: Callable[..., None] = connector.start_load_kv, **kwargs: Any) -> None:
            monkeypatch.undo()
            time.sleep(1.2)
            start(*args, **kwargs)

        monkeypatch.setattr(connector, "start_load_kv", late)
    assert both.hand_over(others, params) == 100
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


def test_smaller_blocks_on_the_decode_side_are_refused(
    pair: Callable[..., Pair], caplog: pytest.LogCaptureFixture
) -> None:
    both = pair(prefill={"block_size": 2 * BLOCK_SIZE, "num_blocks": [30]})
    tokens = prompt(100, 1)
    with vllm_log(caplog.handler):
        assert both.hand_over(tokens, both.offer(tokens)) == 100
    assert "the prefill engine's blocks have 64 tokens and ours 32, which is no multiple" in caplog.text
    assert len(both.decode.stats["failure_rank"]) == 1
    both.prefill.lose_lease("p1")  # nobody could tell it
    assert both.settle() == []


def test_a_question_that_has_no_answer_does_not_end_the_side_channel(pair: Callable[..., Pair]) -> None:
    """As of a decode engine that knows of eight workers, where one has been started in their place."""
    both = pair()
    for question in (msgspec.msgpack.encode((GET_META_MSG, 0, 7)), b"\xc1"):
        with zmq.Context() as context, context.socket(zmq.REQ) as peer:
            peer.setsockopt(zmq.LINGER, 0)
            peer.connect(f"tcp://127.0.0.1:{both.prefill.port}")
            peer.send(question)
            assert not peer.poll(300)
    tokens = prompt(100, 1)
    assert both.hand_over(tokens, both.offer(tokens)) == 1
    assert both.settle() == []


def test_a_stock_prefill_engine_that_is_a_pipeline_is_not_pulled_from(
    both: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = prompt(90, 1)
    both.hand_over(
        tokens, both.offer(tokens)
    )  # connects: the engine here has one stage, and could not be asked for two
    tokens = prompt(100, 1)
    with vllm_log(caplog.handler):
        assert both.hand_over(tokens, {**both.offer(tokens), "pp_size": 2}) == 100
    assert "the prefill engine is a pipeline of 2 stages" in caplog.text
    assert both.settle() == []


def test_half_of_the_ranks_do_not_reach_the_prefill_engine(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = pair(prefill={"kv_lease_duration": 2}, decode={"num_blocks": [40] * 4, "handshake_seconds": 0.5})
    nobody = free_port()
    for connector in both.decode.workers[2:]:
        connect = connector.connector_worker._ensure_handshake

        def misled(engine_id: str, host: str, port: int, *sizes: int, connect: Any = connect) -> Any:
            return connect(engine_id, host, nobody, *sizes)

        monkeypatch.setattr(connector.connector_worker, "_ensure_handshake", misled)

    def hand_over_eight(seed: int) -> tuple[Counter[int], Counter[int]]:
        """Ranks that pulled and that failed to."""
        names = [f"r{seed}-{i}" for i in range(8)]
        for i, name in enumerate(names):
            tokens = prompt(100, seed + i)
            both.decode.add(name, tokens, 3, both.offer(tokens))
        run(both.prefill, both.decode, until=lambda: all(name in both.decode.answered for name in names), seconds=120.0)
        assert both.settle() == []
        return Counter(both.decode.stats.pop("pull_rank", [])), Counter(both.decode.stats.pop("failure_rank", []))

    assert hand_over_eight(1) == ({0: 2, 1: 2}, {2: 2, 3: 2})
    monkeypatch.undo()
    assert hand_over_eight(100) == ({0: 2, 1: 2, 2: 2, 3: 2}, {})


def test_a_prefill_engine_of_ours_is_no_pipeline(both: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    config = both.prefill.config
    monkeypatch.setattr(config.parallel_config, "pipeline_parallel_size", 2)
    with pytest.raises(ValueError, match=r"can't be a pipeline of 2 stages.*use --tensor-parallel-size instead"):
        TokenParallelKVConnector(config, KVConnectorRole.SCHEDULER, None)


def test_decode_engines_do_not_keep_kv_for_the_next_turn(both: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    transfer = both.decode.config.kv_transfer_config
    monkeypatch.setitem(transfer.kv_connector_extra_config, "bidirectional_kv_xfer", True)
    with pytest.raises(ValueError, match="bidirectional_kv_xfer can't be had with TokenParallelKVConnector"):
        TokenParallelKVConnector(both.decode.config, KVConnectorRole.SCHEDULER, None)


WINDOWS = (None, 2 * BLOCK_SIZE)


def test_groups_of_layers_that_see_a_window_alone(pair: Callable[..., Pair]) -> None:
    both = pair(*({"windows": WINDOWS, "num_blocks": n} for n in ([80], [60, 60])))
    for i, length in enumerate((1, BLOCK_SIZE, 64, 65, 100, 300)):
        tokens = prompt(length, i)
        assert both.hand_over(tokens, both.offer(tokens)) == 1
    assert both.settle() == []
    # vLLM reports no blocks of such a pull that failed, but the request.
    tokens = prompt(100, 7)
    params = both.offer(tokens)
    both.lose(params)
    assert both.hand_over(tokens, params) == 100
    assert both.settle() == ["lease_ended"]


def test_latent_attention(llama: Path, alone: None, tmp_path: Path) -> None:
    """On the decode side without token parallelism, which refuses it (tests/services/decode)."""
    half = {"block_size": BLOCK_SIZE // 2}  # what vLLM's latent attention on CPU has
    both = Pair(make_latent_model(tmp_path), half, {**half, "num_blocks": [80]})
    for i, length in enumerate((1, BLOCK_SIZE, 100, 300)):
        tokens = prompt(length, i)
        assert both.hand_over(tokens, both.offer(tokens)) == 1
    tokens = prompt(100, 7)
    params = both.offer(tokens)
    both.lose(params)
    assert both.hand_over(tokens, params) == 100
    assert both.settle() == ["lease_ended"]
    both.decode.shutdown()
    both.prefill.shutdown()


def test_an_engine_that_was_introduced_is_connected_before_the_first_request(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = pair()
    heard: list[str] = []
    keeper = both.prefill.workers[0].connector_worker
    monkeypatch.setattr(keeper, "_handle_heartbeat", heard.append)
    engine_id = both.prefill.config.kv_transfer_config.engine_id
    for worker in both.decode.workers:
        worker.connect_peer(engine_id, "127.0.0.1", both.prefill.port, tp_size=1, dcp_size=1, pp_size=1)
        handshake = worker.connector_worker._handshake_futures.get(engine_id)
        assert handshake is not None
        handshake.result(20)
        worker.connector_worker._handshake_initiation_executor.shutdown()  # there is no other
    deadline = time.monotonic() + 10  # they are under way still
    while len(heard) < len(both.decode.workers) and time.monotonic() < deadline:
        keeper._get_new_notifs()
    assert heard == ["", ""]
    tokens = prompt(100, 1)
    assert both.hand_over(tokens, both.offer(tokens)) == 1
    assert both.settle() == []


def test_an_engine_that_could_not_be_read_ahead_is_read_all_the_same(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise TimeoutError("no answer")

    monkeypatch.setattr(TokenParallelConnectorWorker, "_read_first_row", refuse)
    both = pair()
    tokens = prompt(100, 1)
    with vllm_log(caplog.handler):
        assert both.hand_over(tokens, both.offer(tokens)) == 1
    assert both.settle() == []
    assert "was not read ahead: TimeoutError('no answer')" in caplog.text


@pytest.mark.parametrize("block_size", [BLOCK_SIZE, 2 * BLOCK_SIZE])
def test_checksums_find_a_block_that_is_not_as_it_was(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch, block_size: int
) -> None:
    monkeypatch.setenv("TKNP_KV_CHECKSUMS", "1")
    both = pair(decode={"block_size": block_size})
    for i, length in enumerate((20, 100, 300)):
        tokens = prompt(length, i)
        assert both.hand_over(tokens, both.offer(tokens)) == 1
    assert sum(both.decode.stats["compared_blocks"]) == 1 + 4 + 10, "of the prefill engine's size"
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
