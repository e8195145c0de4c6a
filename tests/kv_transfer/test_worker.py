"""The workers' half of the connector, made by vLLM in a world of one process. What stands on the other side of NIXL,
the prefill engine, is played by the test: `FakePeer` is what the worker sees of NIXL's library."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import HeartbeatInfo, NixlConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker

from kv_transfer import worker as kv_worker
from kv_transfer.metadata import Pull, TokenParallelConnectorMetadata
from kv_transfer.worker import TokenParallelConnectorWorker
from tests.kv_transfer.world import world as make_world
from tests.services.building import kv_cache_config, tiny_config
from tknp.common.partition import BlockPartition, RankPlace, set_place

PARTITION = BlockPartition((10, 20))


@pytest.fixture(scope="module")
def world(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    config = tiny_config(llama, pulls_kv=True)
    config.cache_config.kv_cache_layout = "LBHNC"
    with make_world(config, tmp_path_factory.mktemp("world")):
        yield config


class FakePeer:
    """NIXL's agent: transfers are in progress until the test says otherwise."""

    def __init__(self) -> None:
        self.states: dict[int, str] = {}
        self.sizes: dict[int, int] = {}
        self.notifications: list[bytes] = []
        self.forgotten: list[str] = []

    def check_xfer_state(self, handle: int) -> str:
        return self.states.get(handle, "PROC")

    def get_xfer_telemetry(self, handle: int) -> Any:
        return SimpleNamespace(xferDuration=1, postDuration=1, totalBytes=self.sizes[handle], descCount=1)

    def release_xfer_handle(self, handle: int) -> None:
        pass

    def check_remote_metadata(self, agent: str) -> bool:
        return True

    def remove_remote_agent(self, agent: str) -> None:
        self.forgotten.append(agent)

    def get_new_notifs(self) -> dict[str, list[bytes]]:
        return {}

    def send_notif(self, agent: str, notif_msg: bytes) -> None:
        self.notifications.append(notif_msg)


class Worker:
    """One rank's real worker half."""

    def __init__(self, config: Any, rank: int, monkeypatch: pytest.MonkeyPatch, reads: bool = False) -> None:
        set_place(RankPlace(rank, PARTITION))
        self.half: Any = TokenParallelConnectorWorker(config, "decode", kv_cache_config(PARTITION.num_blocks[rank]))
        self.half.nixl_wrapper = self.peer = FakePeer()
        self.half.transfer_topo = SimpleNamespace(
            get_engine_info=lambda _: SimpleNamespace(remote_physical_blocks_per_logical=1, remote_block_size=32),
            block_size_ratio=lambda _: 1,
        )
        self.handshakes: list[str] = []
        self.read: dict[str, Any] = {}
        monkeypatch.setattr(self.half, "_ensure_handshake", lambda engine, *_: self.handshakes.append(engine))
        if not reads:
            monkeypatch.setattr(self.half, "_read_blocks_for_req", lambda r, meta: self.read.update({r: meta}))

    def order(self, **pulls: tuple[Pull, list[int]]) -> None:
        """Orders of the scheduler: owner, readers and global block ids by request."""
        base = NixlConnectorMetadata()
        for name, (_, blocks) in pulls.items():
            remote = {
                "remote_block_ids": [[0]],
                "remote_engine_id": "prefill",
                "remote_request_id": f"p-{name}",
                "remote_host": "h",
                "remote_port": 1,
                "tp_size": 1,
            }
            base.add_new_req_to_recv(name, (blocks,) if blocks else (), remote, awaiting_kvs=bool(blocks))
        base.heartbeat_by_engine = {"prefill": HeartbeatInfo({"r"}, "h", 1, 1)}
        orders = TokenParallelConnectorMetadata(base, {name: pull for name, (pull, _) in pulls.items()}, {}, idle=False)
        self.half.start_load_kv(orders)

    def transfer(self, request_id: str, *handles: int) -> None:
        """The transfers that reading would have started."""
        self.half._recving_transfers[request_id] = list(handles)

    def end(self, handle: int, kv_bytes: int = 0, state: str = "DONE") -> None:
        self.peer.states[handle], self.peer.sizes[handle] = state, kv_bytes

    def remembered(self) -> list[str]:
        return [*self.half._begun, *self.half._pulled, *self.half._ended]


@pytest.fixture
def worker(world: Any, monkeypatch: pytest.MonkeyPatch) -> Worker:
    return Worker(world, 1, monkeypatch)


def test_a_rank_pulls_its_own_requests_only_into_local_blocks(worker: Worker) -> None:
    worker.order(mine=(Pull(1, 1), [11, 29]), other=(Pull(0, 1), [3, 4]))
    assert worker.read.keys() == {"mine"}
    assert worker.read["mine"].local_block_ids == ([1, 19],)
    assert list(worker.read["mine"].local_physical_block_ids) == [[1, 19]]
    assert set(worker.half._recving_metadata) == {"mine"}


def test_connections_are_limited_behind_the_reads_that_wait_for_nothing(worker: Worker) -> None:
    seen: list[set[str]] = []
    worker.half._silence_limit = SimpleNamespace(apply=lambda: seen.append(set(worker.read)))
    worker.order(mine=(Pull(1, 1), [11, 29]))
    assert seen == [{"mine"}]


def test_the_root_s_ids_are_global_already(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Worker(world, 0, monkeypatch)
    root.order(mine=(Pull(0, 1), [3, 4]), other=(Pull(1, 1), [11]))
    assert root.read["mine"].local_block_ids == ([3, 4],)


def test_only_the_root_sends_heartbeats_the_others_connect(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, messages in ((0, [b"HB:r"]), (1, [])):
        one = Worker(world, rank, monkeypatch)
        one.half._remote_agents["prefill"] = {(0, 0): "agent"}
        one.order()
        assert one.handshakes == ["prefill"]
        assert one.peer.notifications == messages


def test_a_pull_is_reported_once_with_its_bytes_when_all_its_transfers_ended(worker: Worker) -> None:
    worker.order(a=(Pull(1, 1), [11]), b=(Pull(1, 1), [12]))
    worker.transfer("a", 1, 2)
    worker.transfer("b", 3)
    worker.end(1, 100)
    worker.end(3, 7)
    assert worker.half.get_transfer_results().finished_recving == {"b"}
    worker.end(2, 50)
    assert worker.half.get_transfer_results().finished_recving == {"a"}
    report = worker.half.take_report()
    assert {r: (x.rank, x.kv_bytes, x.num_transfers) for r, x in report.records.items()} == {
        "a": (1, 150, 2),
        "b": (1, 7, 1),
    }
    assert all(x.transfer_begin <= x.transfer_end for x in report.records.values())
    assert worker.half.kv_bytes_received == 157
    assert worker.half.take_report() is None
    assert worker.half.get_transfer_results().finished_recving == set()
    assert worker.remembered() == []


def test_a_failed_pull_names_its_blocks_by_their_global_ids_and_leaves_no_record(worker: Worker) -> None:
    worker.order(a=(Pull(1, 2), [11, 12]))
    worker.transfer("a", 1)
    worker.end(1, state="ERR")
    results = worker.half.get_transfer_results()
    assert results.finished_recving == results.failed_recving == {"a"}
    assert worker.half.get_block_ids_with_load_errors() == {11, 12}
    assert worker.half.take_report() is None
    assert worker.remembered() == []


@pytest.mark.parametrize("disconnected", [True, False])
def test_a_connection_that_is_lost_is_made_anew(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, disconnected: bool
) -> None:
    lost = type(kv_worker._DISCONNECTED[0] if disconnected else "nixlBackendError", (RuntimeError,), {})
    monkeypatch.setattr(worker.peer, "check_xfer_state", lambda _: (_ for _ in ()).throw(lost()))
    worker.half._remote_agents["prefill"] = {(0, 0): "agent"}
    worker.half._engine_by_address["h", 1] = "prefill"
    monkeypatch.setattr(worker.half.transfer_topo, "unregister_remote_engine", lambda _: None, raising=False)
    worker.order(a=(Pull(1, 1), [11]), b=(Pull(1, 1), [12]))
    worker.transfer("a", 1)
    worker.transfer("b", 2)
    assert worker.half.get_transfer_results().failed_recving == {"a", "b"}
    # Without a delay, for the first time.
    assert worker.peer.forgotten == (["agent"] if disconnected else [])
    assert ("prefill" in worker.half._remote_agents) is not disconnected


def test_a_pull_whose_handshake_fails_is_reported_as_failed(worker: Worker) -> None:
    worker.order(a=(Pull(1, 1), [11]))
    worker.half._failed_recv_reqs.put("a")
    results = worker.half.get_transfer_results()
    assert results.finished_recving == results.failed_recving == {"a"}
    assert worker.half.get_block_ids_with_load_errors() == {11}
    assert worker.remembered() == []


@pytest.mark.parametrize("blocks", [[11], []], ids=["pull", "notification only"])
def test_every_prefill_rank_hears_how_many_readers_to_wait_for(
    world: Any, monkeypatch: pytest.MonkeyPatch, blocks: list[int]
) -> None:
    told: list[tuple[str, int]] = []

    def read_from_two_ranks(self: Any, req_id: str, meta: Any) -> None:
        for rank in range(2):
            spec = SimpleNamespace(remote_rank=rank, local_block_ids=meta.local_block_ids)
            self._read_blocks(read_spec=spec, request_id=req_id, expected_consumers=2)

    def read(self: Any, request_id: str, expected_consumers: int, **_: Any) -> bool:
        told.append((request_id, expected_consumers))
        return True

    monkeypatch.setattr(NixlPullConnectorWorker, "_read_blocks_for_req", read_from_two_ranks)
    monkeypatch.setattr(NixlPullConnectorWorker, "_read_blocks", read)
    worker = Worker(world, 1, monkeypatch, reads=True)
    worker.order(a=(Pull(1, 3), blocks), b=(Pull(1, 1), [12]))
    assert told == [("a", 6), ("a", 6), ("b", 2), ("b", 2)]


def test_nothing_is_remembered_of_a_notification_that_could_not_be_sent(worker: Worker) -> None:
    worker.order(a=(Pull(1, 3), []))
    worker.half._failed_recv_reqs.put("a")
    assert worker.half.get_transfer_results().finished_recving == set()
    assert worker.remembered() == []


def test_the_computing_thread_keeps_its_cores(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.sched_getaffinity(0)
    Worker(world, 0, monkeypatch)
    assert os.sched_getaffinity(0) == before


def test_a_step_that_only_polls_rests(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float] = []
    monkeypatch.setattr("kv_transfer.worker.time.sleep", rests.append)
    for idle in (False, True):
        worker.half.start_load_kv(TokenParallelConnectorMetadata(NixlConnectorMetadata(), {}, {}, idle))
    assert rests == [worker.half._idle_pause]
    assert rests[0] > 0


class Keeper:
    """A prefill rank's worker half that keeps KV for the given requests, each under a lease `<request>-lease`."""

    def __init__(self, worker: Worker, *requests: str, seconds: float = 30.0) -> None:
        self.worker = worker
        base = NixlConnectorMetadata()
        base.reqs_in_batch = set(requests)
        base.reqs_to_send = {r: time.perf_counter() + seconds for r in requests}
        leases = {r: f"{r}-lease" for r in requests}
        worker.half.start_load_kv(TokenParallelConnectorMetadata(base, {}, leases, idle=True))

    def done(self) -> set[str]:
        sent: set[str] = self.worker.half.get_transfer_results().finished_sending
        return sent


def test_a_released_lease_lets_its_request_s_kv_go_and_no_other_s(worker: Worker) -> None:
    keeper = Keeper(worker, "a", "b")
    assert keeper.done() == set()
    worker.half.release_lease("a-lease")
    assert keeper.done() == {"a"}
    assert keeper.done() == set(), "once"
    assert worker.half._reqs_to_send.keys() == worker.half._lease_ids.keys() == worker.half._reqs_to_process == {"b"}
    assert worker.half.xfer_stats.data["num_kv_expired_reqs"] == []


def test_a_lease_that_is_released_before_it_is_held_is_let_go_as_soon_as_it_is(worker: Worker) -> None:
    worker.half.release_lease("a-lease")
    assert Keeper(worker, "a", "b").done() == {"a"}


def test_a_release_that_nobody_ever_needs_is_forgotten(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    worker.half.release_lease("never-held")
    monkeypatch.setattr(kv_worker, "_RELEASE_SECONDS", 0.0)
    Keeper(worker, "a").done()
    assert worker.half._released == {}


def test_a_lease_that_runs_out_is_counted_as_expired(worker: Worker) -> None:
    keeper = Keeper(worker, "a", seconds=0.0)
    assert keeper.done() == {"a"}
    assert len(worker.half.xfer_stats.data["num_kv_expired_reqs"]) == 1
    assert worker.half._lease_ids == {}
