from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kv_transfer.connector import TokenParallelKVConnector
from kv_transfer.direct.transfer import Telemetry
from kv_transfer.metrics import TransferStats
from tests.services.building import tiny_config


def test_bytes_and_seconds_are_counted_by_rank_and_path(llama: Path) -> None:
    stats = TransferStats()
    stats.rank = 3
    stats.record_transfer(Telemetry(postDuration=10.0, xferDuration=2e6, totalBytes=700, descCount=7))
    stats.record_transfer(SimpleNamespace(xferDuration=1e6, postDuration=1e3, totalBytes=50, descCount=1))
    stats.record_transfer(Telemetry(0.0, 3e6, totalBytes=80, descCount=1, path="packed", wireBytes=41))
    stats.record_transfer(None)
    registry = CollectorRegistry()

    def into_registry(metric: Any) -> Any:
        return lambda *args, **kwargs: metric(*args, **kwargs, registry=registry)

    types = {metric: into_registry(metric) for metric in (Gauge, Counter, Histogram)}
    config = tiny_config(llama, pulls_kv=True)
    metrics = TokenParallelKVConnector.build_prom_metrics(config, types, ["engine"], {0: ["0"]})
    metrics.observe(TransferStats().aggregate(stats).data, 0)
    found = {
        (name, path): registry.get_sample_value(
            f"tknp_kv_transfer_path_{name}_total", {"engine": "0", "rank": "3", "path": path}
        )
        for name in ("bytes", "seconds", "wire_bytes")
        for path in ("direct", "packed", "nixl")
    }
    assert found == {
        ("bytes", "direct"): 700,
        ("bytes", "packed"): 80,
        ("bytes", "nixl"): 50,
        ("seconds", "direct"): 2,
        ("seconds", "packed"): 3,
        ("seconds", "nixl"): 1,
        ("wire_bytes", "direct"): 700,
        ("wire_bytes", "packed"): 41,
        ("wire_bytes", "nixl"): 50,
    }
