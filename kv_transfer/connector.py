"""`TokenParallelKVConnector`: vLLM's NIXL pull connector for engines whose KV cache is divided among token-parallel
ranks.

Scheduler side
    update_state_after_alloc     notes which rank owns the blocks of a request to be pulled
    build_connector_meta         orders the pulls, with their owners
    update_connector_output      keeps the records of finished pulls
Worker side
    save_kv_layer                tells of layers that are computed, where they are streamed
    start_load_kv                the owner starts its pulls; nobody else does, and nothing passes through the root
    get_transfer_results         the owner reports what is done
    build_connector_worker_meta  and how long it took

The protocol on the wire is that of vLLM's NixlConnector (pull mode), so that a stock prefill engine feeds a
token-parallel decode engine unchanged. The same class serves as `kv_producer` on prefill engines, where it adds what
makes NIXL live with few cores. Select it with `--kv-transfer-config '{"kv_connector": "TokenParallelKVConnector",
"kv_connector_module_path": "kv_transfer.connector", ...}'`.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlBaseConnector, NixlPullConnector

from kv_transfer import idle
from kv_transfer.metadata import TransferReport
from kv_transfer.metrics import TransferMetrics, TransferStats
from kv_transfer.rank_offers import engine_id_of
from kv_transfer.scheduler import TokenParallelConnectorScheduler
from kv_transfer.streaming_worker import StreamingConnectorWorker
from tknp.common.partition import get_partition, get_place


class TokenParallelKVConnector(NixlPullConnector):
    """See the module."""

    connector_scheduler: TokenParallelConnectorScheduler | None
    connector_worker: StreamingConnectorWorker | None

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        # Past NixlPullConnector's own, which would make vLLM's two halves.
        NixlBaseConnector.__init__(self, vllm_config, role, kv_cache_config)
        num_stages = vllm_config.parallel_config.pipeline_parallel_size
        if num_stages > 1 and vllm_config.kv_transfer_config.is_kv_producer:
            raise ValueError(
                f"a prefill engine can't be a pipeline of {num_stages} stages, since decode engines read from one; use "
                "--tensor-parallel-size instead of --pipeline-parallel-size"
            )
        if vllm_config.kv_transfer_config.get_from_extra_config("bidirectional_kv_xfer", False):
            raise ValueError(
                "bidirectional_kv_xfer can't be had with TokenParallelKVConnector: what decode engines keep for the "
                "next turn is not told apart by rank, nor checked to be that turn's prompt; leave it out, and use the "
                "router's --pull-back-tokens"
            )
        if role == KVConnectorRole.SCHEDULER:
            idle.install()
            self.connector_scheduler = TokenParallelConnectorScheduler(vllm_config, self.engine_id, kv_cache_config)
        else:
            engine_id = self.engine_id
            if (place := get_place()) is not None and vllm_config.kv_transfer_config.is_kv_producer:
                engine_id = engine_id_of(engine_id, place.rank)
            self.connector_worker = StreamingConnectorWorker(vllm_config, engine_id, kv_cache_config)

    def save_kv_layer(self, layer_name: str, *args: Any, **kwargs: Any) -> None:
        """vLLM has launched a layer's attention."""
        assert self.connector_worker is not None
        self.connector_worker.save_layer(layer_name, self._connector_metadata)

    def get_finished_count(self) -> int | None:
        """Workers that report a request as done: those of the rank that owns it. None stands for all."""
        partition = get_partition()
        return None if partition is None else partition.num_shards

    def build_connector_worker_meta(self) -> TransferReport | None:
        return None if self.connector_worker is None else self.connector_worker.take_report()

    def get_kv_connector_stats(self) -> Any:
        if self.connector_scheduler is not None:
            return self.connector_scheduler.take_stats()
        return super().get_kv_connector_stats()

    def rest_seconds(self, has_unfinished: bool) -> float:
        """In the engine's process: see TokenParallelConnectorScheduler.rest_seconds."""
        assert self.connector_scheduler is not None
        return self.connector_scheduler.rest_seconds(has_unfinished)

    def release_lease(self, lease_id: str) -> None:
        """On a prefill worker: see TokenParallelConnectorWorker.release_lease."""
        assert self.connector_worker is not None
        self.connector_worker.release_lease(lease_id)

    def connect_peer(self, engine_id: str, host: str, port: int, tp_size: int, dcp_size: int, pp_size: int) -> None:
        """On a decode worker: connects to a prefill engine, in the background, ahead of the first request for it."""
        assert self.connector_worker is not None
        self.connector_worker._ensure_handshake(engine_id, host, port, tp_size, dcp_size, pp_size)

    @property
    def kv_bytes_received(self) -> int:
        """Bytes of KV that this worker has pulled since it started."""
        return 0 if self.connector_worker is None else self.connector_worker.kv_bytes_received

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> TransferStats:
        return TransferStats() if data is None else TransferStats(data=data)

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> TransferMetrics:
        return TransferMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
