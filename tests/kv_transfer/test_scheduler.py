from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import RequestStatus

from kv_transfer import scheduler as connector_scheduler
from kv_transfer.metadata import Pull, TransferRecord, TransferReport
from tests.services.building import BLOCK_SIZE, Stepper, request, scheduler, tiny_config


@pytest.fixture(scope="module")
def config(llama: Path) -> Any:
    return tiny_config(llama, pulls_kv=True)


class Engine:
    """A decode engine's scheduler with its half of the connector; the test plays the workers."""

    def __init__(self, config: Any, partition: tuple[int, ...] = (20, 20)) -> None:
        self.scheduler = scheduler(config, partition)
        self.stepper = Stepper(self.scheduler)
        self.half: Any = self.scheduler.connector.connector_scheduler

    def add(self, request_id: str, prompt: range, **extra: Any) -> Any:
        """A request whose prompt's KV a prefill engine holds."""
        params = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": "prefill",
            "remote_request_id": f"p-{request_id}",
            "remote_block_ids": [list(range(-(-len(prompt) // BLOCK_SIZE)))],
            "remote_host": "127.0.0.1",
            "remote_port": 1,
            "tp_size": 1,
            **extra,
        }
        req = request(request_id, prompt, kv_transfer_params=params)
        self.scheduler.add_request(req)
        return req

    def step(self, **reported: Any) -> Any:
        """One step in which the workers report `reported`; returns the connector's orders of that step."""
        output = self.stepper.step(KVConnectorOutput(**reported) if reported else None)
        return output.kv_connector_metadata

    def rank_of(self, request_id: str) -> Any:
        return self.scheduler.kv_cache_manager.rank_of(request_id)

    @property
    def free_blocks(self) -> Any:
        return self.scheduler.kv_cache_manager.free_blocks_per_rank()


def record(begin: float = 1.0, end: float = 2.0, rank: int = 1) -> TransferRecord:
    return TransferRecord(rank, kv_bytes=100, num_transfers=1, transfer_begin=begin, transfer_end=end)


def test_the_rank_that_got_the_blocks_is_ordered_to_pull(config: Any) -> None:
    engine = Engine(config)
    for i in range(2):
        engine.add(f"r{i}", range(1000 * i, 1000 * i + 100))
    orders = engine.step()
    assert {r: pull.owner for r, pull in orders.pulls.items()} == {"r0": 1, "r1": 0}
    for name, pull in orders.pulls.items():
        blocks = orders.reqs_to_recv[name].local_block_ids[0]
        assert len(blocks) == 4
        assert engine.scheduler.kv_cache_manager.partition.rank_of_all(blocks) == pull.owner == engine.rank_of(name)
    assert engine.step().pulls == {}


def test_a_request_runs_once_its_owner_has_reported(config: Any) -> None:
    engine = Engine(config)
    engine.add("r", range(100))
    engine.step()
    assert engine.scheduler.requests["r"].status == RequestStatus.WAITING_FOR_REMOTE_KVS
    engine.step(finished_recving={"r"})
    engine.step()
    assert engine.scheduler.requests["r"].status == RequestStatus.RUNNING
    engine.stepper.finish()
    assert engine.free_blocks == [19, 19]


def test_an_abort_during_the_pull_keeps_the_blocks_until_the_pull_has_ended(config: Any) -> None:
    engine = Engine(config)
    engine.add("r", range(100))
    engine.step()
    engine.scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED)
    engine.step()
    assert engine.free_blocks == [19, 15]
    engine.step(finished_recving={"r"}, kv_connector_worker_meta=TransferReport({"r": record()}))
    assert engine.free_blocks == [19, 19]
    assert engine.rank_of("r") is None


def test_a_request_aborted_before_it_got_blocks_lets_the_root_tell_the_prefill_engine(config: Any) -> None:
    engine = Engine(config)
    engine.add("1_r", range(100), tknp_num_readers=2)
    engine.scheduler.finish_requests("1_r", RequestStatus.FINISHED_ABORTED)
    orders = engine.step()
    assert orders.pulls == {"1_r": Pull(owner=0, num_readers=2)}
    assert not any(orders.reqs_to_recv["1_r"].local_block_ids)
    assert engine.free_blocks == [19, 19]


def test_what_the_rank_has_already_is_not_pulled_again(config: Any) -> None:
    engine = Engine(config, (60, 60))
    engine.add("r0", range(100))
    engine.step()
    engine.step(finished_recving={"r0"})
    engine.step()
    engine.add("r1", range(100))
    orders = engine.step()
    assert orders.pulls["r1"].owner == engine.rank_of("r1") == engine.rank_of("r0") == 1
    blocks = engine.scheduler.kv_cache_manager.get_block_ids("r1")[0]
    assert orders.reqs_to_recv["r1"].local_block_ids[0] == blocks[3:]
    assert blocks[:3] == engine.scheduler.kv_cache_manager.get_block_ids("r0")[0][:3]


def test_a_failed_pull_is_computed_locally_and_gives_its_blocks_back(config: Any) -> None:
    engine = Engine(config)
    engine.add("r", range(100))
    blocks = engine.step().reqs_to_recv["r"].local_block_ids[0]
    assert engine.scheduler.kv_cache_manager.partition.rank_of_all(blocks) == 1
    engine.step(finished_recving={"r"}, failed_recving={"r"}, invalid_block_ids=set(blocks))
    output = engine.step()
    assert output.pulls == {}, "it must not pull again"
    assert engine.scheduler.requests["r"].num_computed_tokens == 64, "a chunk of the prompt was computed"
    engine.stepper.finish()
    assert engine.free_blocks == [19, 19]


def test_a_failed_pull_after_an_abort_frees_the_blocks_once(config: Any) -> None:
    engine = Engine(config)
    engine.add("r", range(100))
    blocks = engine.step().reqs_to_recv["r"].local_block_ids[0]
    engine.scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED)
    engine.step(finished_recving={"r"}, failed_recving={"r"}, invalid_block_ids=set(blocks))
    assert engine.free_blocks == [19, 19]


def test_pulls_wait_while_their_rank_is_full_and_no_order_goes_out(config: Any) -> None:
    engine = Engine(config, (6, 6))
    for i in range(4):
        engine.add(f"r{i}", range(1000 * i, 1000 * i + 100))
    orders = engine.step()
    assert set(orders.pulls) == {"r0", "r1"}
    assert engine.step().pulls == {}
    orders = engine.step(finished_recving={"r0", "r1"})
    for _ in range(60):
        orders = engine.step(finished_recving=set(orders.pulls)) if orders.pulls else engine.step()
        if not engine.scheduler.has_unfinished_requests():
            break
    assert not engine.scheduler.has_unfinished_requests()
    assert engine.free_blocks == [5, 5]


@pytest.mark.parametrize(
    ("name", "extra", "expected"),
    [
        ("r", {}, 1),
        ("0_r", {"tknp_num_readers": 3}, 3),
        # Refused before vLLM split it into `0_r`, `1_r`, ...: nobody else will read.
        ("r", {"tknp_num_readers": 3}, 1),
    ],
)
def test_every_sequence_of_a_client_request_is_a_reader(
    config: Any, name: str, extra: dict[str, Any], expected: int
) -> None:
    engine = Engine(config)
    engine.add(name, range(100), **extra)
    assert engine.step().pulls[name].num_readers == expected


def test_a_malformed_number_of_readers_does_not_end_the_engine(config: Any) -> None:
    engine = Engine(config)
    engine.add("0_r", range(100), tknp_num_readers="many")
    engine.step()


def test_a_record_is_kept_under_the_router_s_name(config: Any) -> None:
    engine = Engine(config)
    engine.add("r", range(100), tknp_request_id="from-router")
    engine.step()
    engine.step(finished_recving={"r"}, kv_connector_worker_meta=TransferReport({"r": record()}))
    assert engine.half.records == {"from-router": record()}


def test_the_sequences_of_one_client_request_share_a_record(config: Any) -> None:
    engine = Engine(config)
    for i in range(2):
        engine.add(f"{i}_r", range(100), tknp_request_id="name", tknp_num_readers=2)
    engine.step()
    reports = {"0_r": record(1.0, 2.0, rank=1), "1_r": record(0.5, 1.5, rank=0)}
    for name, one in reports.items():
        engine.step(finished_recving={name}, kv_connector_worker_meta=TransferReport({name: one}))
    assert engine.half.records == {"name": TransferRecord(0, 200, 2, 0.5, 2.0)}


def test_only_the_latest_records_are_kept(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connector_scheduler, "_MAX_RECORDS", 3)
    engine = Engine(config)
    for i in range(5):
        report = TransferReport({f"r{i}": record()})
        engine.half.update_connector_output(KVConnectorOutput(kv_connector_worker_meta=report))
    assert list(engine.half.records) == ["r2", "r3", "r4"]


def test_tensor_parallel_workers_that_end_in_different_steps_share_a_record(config: Any) -> None:
    engine = Engine(config)
    engine.add("r", range(100), tknp_request_id="name")
    engine.step()
    engine.step(kv_connector_worker_meta=TransferReport({"r": record()}))
    engine.step(finished_recving={"r"}, kv_connector_worker_meta=TransferReport({"r": record()}))
    assert set(engine.half.records) == {"name"}


@pytest.mark.parametrize("end", ["abort", "failure"])
def test_nothing_is_remembered_of_a_pull_that_came_to_nothing(config: Any, end: str) -> None:
    engine = Engine(config)
    engine.add("r", range(100))
    if end == "abort":
        engine.scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED)
        engine.step()
    else:
        blocks = engine.step().reqs_to_recv["r"].local_block_ids[0]
        engine.step(finished_recving={"r"}, failed_recving={"r"}, invalid_block_ids=set(blocks))
        engine.stepper.finish()
    assert not engine.half._owners
    assert not engine.half._names


def test_kv_that_is_kept_goes_to_the_workers_with_the_router_s_name_for_it(config: Any) -> None:
    engine = Engine(config)
    for name, params in (("named", {"tknp_lease_id": "lease"}), ("stock", {}), ("odd", {"tknp_lease_id": 7})):
        kept = request(name, range(70), kv_transfer_params={"do_remote_decode": True, **params})
        kept.status = RequestStatus.FINISHED_LENGTH_CAPPED
        assert engine.half.request_finished(kept, ([1, 2, 3],))[0] is True
    aborted = request("aborted", range(70), kv_transfer_params={"do_remote_decode": True, "tknp_lease_id": "no"})
    aborted.status = RequestStatus.FINISHED_ABORTED
    assert engine.half.request_finished(aborted, ([4],))[0] is False
    orders = engine.step()
    assert orders.reqs_to_send.keys() == {"named", "stock", "odd"}
    assert orders.lease_ids == {"named": "lease"}
    assert engine.step().lease_ids == {}


def test_a_decode_engine_keeps_no_kv_for_others(config: Any) -> None:
    engine = Engine(config)
    engine.add("r", range(100), do_remote_prefill=False, do_remote_decode=True)
    assert not engine.step().reqs_to_recv
    engine.scheduler.finish_requests("r", RequestStatus.FINISHED_STOPPED)
    assert not engine.step().reqs_to_send
