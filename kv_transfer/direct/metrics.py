"""Which path the bytes of KV cache took to which rank, beside vLLM's statistics of NIXL."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats, NixlPromMetrics


class PathStats(NixlKVConnectorStats):
    """For each transfer in vLLM's lists its path (`direct`, `packed` or `nixl`), rank, and the bytes that crossed."""

    rank = 0
    """Token-parallel rank of the worker that counts."""

    def reset(self) -> None:
        super().reset()
        self.data.update(transfer_path=[], transfer_rank=[], wire_bytes=[])

    def record_transfer(self, res: Any) -> None:
        super().record_transfer(res)
        if res is not None:  # vLLM's other lists have one item for it, too
            self.data["transfer_path"].append(getattr(res, "path", "nixl"))
            self.data["transfer_rank"].append(self.rank)
            compressed = getattr(res, "wireBytes", None)
            self.data["wire_bytes"].append(res.totalBytes if compressed is None else compressed)


class PathMetrics(NixlPromMetrics):
    """`tknp_kv_transfer_path_bytes_total`, `tknp_kv_transfer_path_seconds_total` and
    `tknp_kv_transfer_path_wire_bytes_total`."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        labels = [*labelnames, "rank", "path"]
        self._path_bytes = self._counter_cls(
            name="tknp_kv_transfer_path_bytes",
            documentation="Bytes of KV cache pulled, by the path they took: direct, packed or nixl.",
            labelnames=labels,
        )
        self._wire_bytes = self._counter_cls(
            name="tknp_kv_transfer_path_wire_bytes",
            documentation="Bytes that crossed for it, by path; less where KV cache is compressed.",
            labelnames=labels,
        )
        self._path_seconds = self._counter_cls(
            name="tknp_kv_transfer_path_seconds",
            documentation="Seconds that transfers took, by path; those at the same time count each.",
            labelnames=labels,
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        super().observe(transfer_stats_data, engine_idx)
        values = self.per_engine_labelvalues[engine_idx]
        for rank, path, seconds, num_bytes, wire_bytes in zip(
            transfer_stats_data["transfer_rank"],
            transfer_stats_data["transfer_path"],
            transfer_stats_data["transfer_duration"],
            transfer_stats_data["bytes_transferred"],
            transfer_stats_data["wire_bytes"],
            strict=True,
        ):
            labels = [*values, str(rank), path]
            self._path_bytes.labels(*labels).inc(num_bytes)
            self._wire_bytes.labels(*labels).inc(wire_bytes)
            self._path_seconds.labels(*labels).inc(seconds)
