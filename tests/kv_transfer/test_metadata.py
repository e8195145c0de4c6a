from __future__ import annotations

import pickle

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import HeartbeatInfo, NixlConnectorMetadata

from kv_transfer.metadata import Pull, TokenParallelConnectorMetadata, TransferRecord, TransferReport

ONE = TransferRecord(rank=0, kv_bytes=10, num_transfers=1, transfer_begin=5.0, transfer_end=6.0)
TWO = TransferRecord(rank=1, kv_bytes=7, num_transfers=2, transfer_begin=4.0, transfer_end=5.5)


def test_records_of_parts_add_up() -> None:
    merged = TransferRecord(rank=1, kv_bytes=17, num_transfers=3, transfer_begin=4.0, transfer_end=6.0)
    assert ONE.merged_with(TWO) == merged


def test_reports_of_workers_are_joined_by_request() -> None:
    report = TransferReport({"a": ONE, "b": ONE}).aggregate(TransferReport({"a": TWO, "c": TWO}))
    assert report.records == {"a": ONE.merged_with(TWO), "b": ONE, "c": TWO}


def test_joining_leaves_the_parts_alone() -> None:
    first, second = TransferReport({"a": ONE}), TransferReport({"a": TWO})
    first.aggregate(second)
    assert (first.records, second.records) == ({"a": ONE}, {"a": TWO})


@pytest.mark.parametrize("idle", [True, False])
def test_orders_reach_another_process_with_all_that_vllm_put_into_them(idle: bool) -> None:
    base = NixlConnectorMetadata()
    base.reqs_to_send = {"s": 3.0}
    base.scheduler_clock = 2.0
    base.heartbeat_by_engine = {"e": HeartbeatInfo({"r"}, "host", 1, 1)}
    orders = TokenParallelConnectorMetadata(base, {"r": Pull(1, 2)}, {"s": "lease"}, idle)
    received = pickle.loads(pickle.dumps(orders))
    assert isinstance(received, NixlConnectorMetadata)
    assert received.pulls == {"r": Pull(1, 2)}
    assert received.lease_ids == {"s": "lease"}
    assert received.idle is idle
    for name, value in vars(base).items():
        assert getattr(received, name) == value, name
