from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats

from kv_transfer.connector import TokenParallelKVConnector
from kv_transfer.handover import HandOver, Stage
from kv_transfer.lease_check import Stale
from kv_transfer.metadata import TransferRecord
from kv_transfer.metrics import TransferStats
from tests.services.building import tiny_config

ENGINE = {"model_name": "tiny", "engine": "0"}


def stats(*pulls: tuple[int, float, int]) -> TransferStats:
    made = TransferStats()
    for rank, seconds, kv_bytes in pulls:
        made.record_pull(
            TransferRecord(rank, kv_bytes, 1, 100.0, 100.0 + seconds, path="nixl", hidden_bytes=kv_bytes // 2)
        )
    return made


@pytest.fixture(scope="module")
def config(llama: Path) -> Any:
    return tiny_config(llama, pulls_kv=True)


def observed(config: Any, found: TransferStats) -> CollectorRegistry:
    """A registry of its own, into which vLLM's way of making metrics has put `found`."""
    registry = CollectorRegistry()

    def into_registry(metric: Any) -> Any:
        return lambda *args, **kwargs: metric(*args, **kwargs, registry=registry)

    types = {metric: into_registry(metric) for metric in (Gauge, Counter, Histogram)}
    labels: dict[int, list[object]] = {0: ["tiny", "0"]}
    metrics = TokenParallelKVConnector.build_prom_metrics(config, types, ["model_name", "engine"], labels)
    metrics.observe(found.data, 0)
    return registry


def test_duration_and_bytes_are_counted_by_rank_under_the_names_of_the_interface(config: Any) -> None:
    registry = observed(config, stats((1, 0.25, 1000), (1, 0.5, 500), (0, 2.0, 7)))
    labels = {**ENGINE, "rank": "1", "path": "nixl"}
    assert registry.get_sample_value("kv_transfer_duration_seconds_count", labels) == 2
    assert registry.get_sample_value("kv_transfer_duration_seconds_sum", labels) == pytest.approx(0.75)
    assert registry.get_sample_value("kv_transfer_duration_seconds_bucket", {**labels, "le": "0.25"}) == 1
    assert registry.get_sample_value("tknp_kv_transfer_bytes_total", labels) == 1500
    assert registry.get_sample_value("tknp_kv_transfer_bytes_total", {**labels, "rank": "0"}) == 7
    assert registry.get_sample_value("tknp_kv_transfer_hidden_bytes_total", labels) == 750


def test_vllm_s_own_metrics_are_still_there(config: Any) -> None:
    registry = observed(config, stats())
    assert registry.get_sample_value("vllm:nixl_bytes_transferred_count", ENGINE) == 0


def test_a_hand_over_is_the_sum_of_its_stages(config: Any) -> None:
    found = TransferStats()
    found.record_handover(HandOver(1, "direct", {Stage.ROOM: 2.0, Stage.PULL: 0.5, Stage.RESUME: 0.25}))
    registry = observed(config, found)
    labels = {**ENGINE, "rank": "1", "path": "direct"}
    assert registry.get_sample_value("tknp_kv_handover_seconds_sum", labels) == 2.75
    stage = {**labels, "stage": "room"}
    assert registry.get_sample_value("tknp_kv_handover_stage_seconds_total", stage) == 2.0


def test_what_came_to_nothing_is_counted_by_rank(config: Any) -> None:
    found = TransferStats()
    found.record_stale(1, Stale.LEASE_ENDED, "nixl")
    found.record_failure(1)
    found.record_retry(1)
    assert not found.is_empty()
    registry = observed(config, found)
    labels = {**ENGINE, "rank": "1"}
    stale = {**labels, "path": "nixl", "reason": "lease_ended"}
    assert registry.get_sample_value("tknp_kv_transfer_stale_total", stale) == 1
    assert registry.get_sample_value("tknp_kv_transfer_failed_total", labels) == 1
    assert registry.get_sample_value("tknp_kv_transfer_retries_total", labels) == 1


def test_statistics_of_ranks_add_up_on_the_way_to_the_server() -> None:
    merged = stats((0, 1.0, 5)).aggregate(stats((1, 2.0, 6), (1, 3.0, 7)))
    assert merged.data["pull_rank"] == [0, 1, 1]
    assert merged.data["pull_bytes"] == [5, 6, 7]
    built = TokenParallelKVConnector.build_kv_connector_stats(pickle.loads(pickle.dumps(merged.data)))
    assert isinstance(built, NixlKVConnectorStats)
    assert built.data == merged.data


def test_a_pull_alone_makes_statistics_worth_sending() -> None:
    assert TransferStats().is_empty()
    assert not stats((0, 1.0, 5)).is_empty()


def test_taking_the_statistics_starts_new_ones() -> None:
    worker = stats((0, 1.0, 5))
    taken = worker.clone_and_reset()
    assert taken.data["pull_seconds"] == [1.0]
    assert worker.is_empty()
    worker.record_pull(TransferRecord(2, 1, 1, 0.0, 1.0))
    assert taken.data["pull_rank"] == [0]


def test_vllm_s_log_line_is_made_of_them() -> None:
    made = stats((0, 1.0, 5))
    made.record_transfer(SimpleNamespace(xferDuration=1e6, postDuration=1e3, totalBytes=5, descCount=1))
    assert made.reduce()["Num successful transfers"] == 1
