"""Prometheus metrics of KV transfer, on the decode engine that pulls."""

from __future__ import annotations

from typing import Any

from kv_transfer.direct.metrics import PathMetrics, PathStats
from kv_transfer.lease_check import Stale
from kv_transfer.metadata import TransferRecord

DURATION_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Seconds: from a few pages over shared memory to a long prompt over a slow network."""
_OWN = ("pull_rank", "pull_seconds", "pull_bytes", "pull_hidden_bytes", "stale_rank", "stale_reason", "retry_rank")


class TransferStats(PathStats):
    """vLLM's NIXL statistics and, for each finished pull, its rank, seconds, bytes, and bytes that were hidden, as four
    lists of equal length; so too the rank and the reason of each offer that was not used."""

    def reset(self) -> None:
        super().reset()
        self.data.update({name: [] for name in _OWN})

    def record_pull(self, record: TransferRecord) -> None:
        self.data["pull_rank"].append(record.rank)
        self.data["pull_seconds"].append(record.transfer_end - record.transfer_begin)
        self.data["pull_bytes"].append(record.kv_bytes)
        self.data["pull_hidden_bytes"].append(record.hidden_bytes)

    def record_stale(self, rank: int, reason: Stale) -> None:
        self.data["stale_rank"].append(rank)
        self.data["stale_reason"].append(reason.value)

    def record_retry(self, rank: int) -> None:
        self.data["retry_rank"].append(rank)

    def is_empty(self) -> bool:
        return bool(super().is_empty()) and not any(self.data[name] for name in _OWN)


class TransferMetrics(PathMetrics):
    """`kv_transfer_duration_seconds` and `tknp_kv_transfer_*` by rank, beside vLLM's `vllm:nixl_*`."""

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
        self._hidden = self._counter_cls(
            name="tknp_kv_transfer_hidden_bytes",
            documentation="Of these, bytes that had arrived when the prefill engine had computed the whole prompt.",
            labelnames=labels,
        )
        self._stale = self._counter_cls(
            name="tknp_kv_transfer_stale",
            documentation="Offers of KV cache that were not used, because it was not sure to be the prompt's any more.",
            labelnames=[*labels, "reason"],
        )
        self._retries = self._counter_cls(
            name="tknp_kv_transfer_retries",
            documentation="Prefill engines that had to be asked again before they answered the handshake.",
            labelnames=labels,
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        super().observe(transfer_stats_data, engine_idx)
        values = self.per_engine_labelvalues[engine_idx]
        for rank, seconds, kv_bytes, hidden_bytes in zip(
            transfer_stats_data["pull_rank"],
            transfer_stats_data["pull_seconds"],
            transfer_stats_data["pull_bytes"],
            transfer_stats_data["pull_hidden_bytes"],
            strict=True,
        ):
            self._duration.labels(*values, str(rank)).observe(seconds)
            self._bytes.labels(*values, str(rank)).inc(kv_bytes)
            self._hidden.labels(*values, str(rank)).inc(hidden_bytes)
        for rank, reason in zip(transfer_stats_data["stale_rank"], transfer_stats_data["stale_reason"], strict=True):
            self._stale.labels(*values, str(rank), reason).inc()
        for rank in transfer_stats_data["retry_rank"]:
            self._retries.labels(*values, str(rank)).inc()
