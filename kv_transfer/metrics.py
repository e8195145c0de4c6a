"""Prometheus metrics of KV transfer, on the decode engine that pulls."""

from __future__ import annotations

from typing import Any

from kv_transfer.direct.metrics import PathMetrics, PathStats
from kv_transfer.metadata import TransferRecord

DURATION_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Seconds: from a few pages over shared memory to a long prompt over a slow network."""


class TransferStats(PathStats):
    """vLLM's NIXL statistics and, for each finished pull, its rank, seconds and bytes, as three lists of equal
    length."""

    def reset(self) -> None:
        super().reset()
        self.data.update({"pull_rank": [], "pull_seconds": [], "pull_bytes": []})

    def record_pull(self, record: TransferRecord) -> None:
        self.data["pull_rank"].append(record.rank)
        self.data["pull_seconds"].append(record.transfer_end - record.transfer_begin)
        self.data["pull_bytes"].append(record.kv_bytes)

    def is_empty(self) -> bool:
        return bool(super().is_empty()) and not self.data["pull_rank"]


class TransferMetrics(PathMetrics):
    """`kv_transfer_duration_seconds` and `tknp_kv_transfer_bytes_total` by rank, beside vLLM's `vllm:nixl_*`."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        labels = [*labelnames, "rank"]
        self._duration = self._histogram_cls(
            name="kv_transfer_duration_seconds",
            documentation="From the order to pull a request's KV cache until it is complete on the rank that owns it.",
            buckets=DURATION_BUCKETS,
            labelnames=labels,
        )
        self._bytes = self._counter_cls(
            name="tknp_kv_transfer_bytes",
            documentation="Bytes of KV cache that a token-parallel rank has pulled from prefill engines.",
            labelnames=labels,
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        super().observe(transfer_stats_data, engine_idx)
        values = self.per_engine_labelvalues[engine_idx]
        for rank, seconds, kv_bytes in zip(
            transfer_stats_data["pull_rank"],
            transfer_stats_data["pull_seconds"],
            transfer_stats_data["pull_bytes"],
            strict=True,
        ):
            self._duration.labels(*values, str(rank)).observe(seconds)
            self._bytes.labels(*values, str(rank)).inc(kv_bytes)
