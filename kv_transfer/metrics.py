"""Prometheus metrics of KV transfer, on the decode engine that pulls."""

from __future__ import annotations

from typing import Any

from kv_transfer.copies import NO_PATH
from kv_transfer.direct.metrics import PathMetrics, PathStats
from kv_transfer.handover import HandOver
from kv_transfer.lease_check import Stale
from kv_transfer.metadata import TransferRecord

DURATION_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Seconds: from a few pages over shared memory to a long prompt over a slow network."""
_OWN = (
    *("pull_rank", "pull_path", "pull_seconds", "pull_bytes", "pull_hidden_bytes"),
    *("handover_rank", "handover_path", "handover_seconds"),
    *("stale_rank", "stale_path", "stale_reason"),
    *("failure_rank", "retry_rank", "compared_rank", "compared_blocks"),
)


class TransferStats(PathStats):
    """vLLM's NIXL statistics and lists of our own, of equal length where they begin alike: an item for each finished
    pull, hand-over, offer that was not used, pull that failed, and handshake that was tried again."""

    def reset(self) -> None:
        super().reset()
        self.data.update({name: [] for name in _OWN})

    def record_pull(self, record: TransferRecord) -> None:
        self.data["pull_rank"].append(record.rank)
        self.data["pull_path"].append(record.path)
        self.data["pull_seconds"].append(record.transfer_end - record.transfer_begin)
        self.data["pull_bytes"].append(record.kv_bytes)
        self.data["pull_hidden_bytes"].append(record.hidden_bytes)

    def record_handover(self, handover: HandOver) -> None:
        self.data["handover_rank"].append(handover.rank)
        self.data["handover_path"].append(handover.path)
        self.data["handover_seconds"].append({stage.value: s for stage, s in handover.seconds.items()})

    def record_stale(self, rank: int, reason: Stale, path: str = NO_PATH) -> None:
        self.data["stale_rank"].append(rank)
        self.data["stale_path"].append(path)
        self.data["stale_reason"].append(reason.value)

    def record_failure(self, rank: int) -> None:
        self.data["failure_rank"].append(rank)

    def record_compared(self, num_blocks: int) -> None:
        self.data["compared_rank"].append(self.rank)
        self.data["compared_blocks"].append(num_blocks)

    def record_retry(self, rank: int) -> None:
        self.data["retry_rank"].append(rank)

    def is_empty(self) -> bool:
        return bool(super().is_empty()) and not any(self.data[name] for name in _OWN)


class TransferMetrics(PathMetrics):
    """`kv_transfer_duration_seconds`, `tknp_kv_handover_*` and `tknp_kv_transfer_*` by rank, beside vLLM's
    `vllm:nixl_*`."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        by_rank = [*labelnames, "rank"]
        by_path = [*by_rank, "path"]
        self._duration = self._histogram_cls(
            name="kv_transfer_duration_seconds",
            documentation="From the order to pull a request's KV cache until it is complete on the rank that owns it.",
            buckets=DURATION_BUCKETS,
            labelnames=by_path,
        )
        self._handover = self._histogram_cls(
            name="tknp_kv_handover_seconds",
            documentation="From a request's arrival at the engine to its first step, less the copy of its KV cache.",
            buckets=DURATION_BUCKETS,
            labelnames=by_path,
        )
        self._stage = self._counter_cls(
            name="tknp_kv_handover_stage_seconds",
            documentation="The parts of tknp_kv_handover_seconds: room, pull (less the copy), resume.",
            labelnames=[*by_path, "stage"],
        )
        self._bytes = self._counter_cls(
            name="tknp_kv_transfer_bytes",
            documentation="Bytes of KV cache that a token-parallel rank has pulled from prefill engines.",
            labelnames=by_path,
        )
        self._hidden = self._counter_cls(
            name="tknp_kv_transfer_hidden_bytes",
            documentation="Of these, bytes that had arrived when the prefill engine had computed the whole prompt.",
            labelnames=by_path,
        )
        self._stale = self._counter_cls(
            name="tknp_kv_transfer_stale",
            documentation="Offers of KV cache that were not used, because it was not sure to be the prompt's any more.",
            labelnames=[*by_path, "reason"],
        )
        self._failed = self._counter_cls(
            name="tknp_kv_transfer_failed",
            documentation="Pulls that failed: the prefill engine did not answer, or its KV cache could not be read.",
            labelnames=by_rank,
        )
        self._compared = self._counter_cls(
            name="tknp_kv_transfer_compared_blocks",
            documentation="Pulled blocks, in the prefill engine's size, that were compared with their checksum.",
            labelnames=by_rank,
        )
        self._retries = self._counter_cls(
            name="tknp_kv_transfer_retries",
            documentation="Prefill engines that had to be asked again before they answered the handshake.",
            labelnames=by_rank,
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        super().observe(transfer_stats_data, engine_idx)
        values = self.per_engine_labelvalues[engine_idx]

        def items(kind: str, *names: str) -> Any:
            """Rank as a label, and the others, of each item in lists that begin with `kind`."""
            lists = (transfer_stats_data[f"{kind}_{name}"] for name in ("rank", *names))
            return ((str(rank), *rest) for rank, *rest in zip(*lists, strict=True))

        for rank, path, seconds, kv_bytes, hidden_bytes in items("pull", "path", "seconds", "bytes", "hidden_bytes"):
            self._begin(*values, rank, path=path)
            self._duration.labels(*values, rank, path).observe(seconds)
            self._bytes.labels(*values, rank, path).inc(kv_bytes)
            self._hidden.labels(*values, rank, path).inc(hidden_bytes)
        for rank, path, stages in items("handover", "path", "seconds"):
            self._handover.labels(*values, rank, path).observe(sum(stages.values()))
            for stage, seconds in stages.items():
                self._stage.labels(*values, rank, path, stage).inc(seconds)
        for rank, path, reason in items("stale", "path", "reason"):
            self._stale.labels(*values, rank, path, reason).inc()
        for (rank,) in items("failure"):
            self._failed.labels(*values, rank).inc()
        for rank, num_blocks in items("compared", "blocks"):
            self._compared.labels(*values, rank).inc(num_blocks)
        for (rank,) in items("retry"):
            self._retries.labels(*values, rank).inc()

    def _begin(self, *of_rank: object, path: str) -> None:
        """Counters of what goes wrong start at 0: Prometheus does not see the first increase of one that was not there
        before."""
        self._failed.labels(*of_rank)
        self._retries.labels(*of_rank)
        for reason in Stale:
            self._stale.labels(*of_rank, path, reason.value)
