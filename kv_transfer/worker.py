"""The workers' half of the connector: the owning rank pulls a request's KV straight from the prefill ranks."""

from __future__ import annotations

import os
import sys
import time
import uuid
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import ReqMeta
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
from vllm.distributed.nixl_utils import NixlWrapper, nixl_agent_config
from vllm.logger import init_logger
from vllm.platforms import current_platform

from kv_transfer.metadata import TokenParallelConnectorMetadata, TransferRecord, TransferReport
from kv_transfer.metrics import TransferStats
from tknp.common.partition import RankPlace, get_place
from tknp.common.silence import SilenceLimit

logger = init_logger(f"vllm.{__name__}")

_IDLE_PAUSE_SECONDS = 0.001
"""On CPU, how long a step that only polls transfers rests. vLLM's engine steps without pause while a transfer or a
lease is pending (v1/core/sched/scheduler.py, has_finished_requests), which would take a core from whoever
computes."""

_RELEASE_SECONDS = 60.0
"""How long the release of a lease is remembered that is not held yet; the request behind it ends long before, or was
aborted."""

_DISCONNECTED = "nixlRemoteDisconnectError"
"""NIXL's exception, by name, since its module is called after the CUDA version."""


@dataclass
class _OwnPull(ReqMeta):
    """One of this rank's orders; see `Pull.num_readers`."""

    num_readers: int = 1


class TokenParallelConnectorWorker(NixlPullConnectorWorker):
    """vLLM's pull worker, restricted to the requests of its own rank."""

    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        on_host = current_platform.is_cpu()
        affinity = os.sched_getaffinity(0)
        super().__init__(vllm_config, engine_id, kv_cache_config)
        if on_host:
            # vLLM pins this thread, which also computes, to the last core of each NUMA node, where all engines meet.
            os.sched_setaffinity(0, affinity)
        if not vllm_config.kv_transfer_config.get_from_extra_config("progress_thread", not on_host):
            self._drop_progress_thread(vllm_config)
        self._place: RankPlace | None = get_place()
        self._idle_pause = _IDLE_PAUSE_SECONDS if on_host else 0.0
        self._num_readers = 1
        self._silence_limit = SilenceLimit()
        self._begun: dict[str, float] = {}
        self._pulled: dict[str, tuple[int, int]] = {}
        self._ended: dict[str, TransferRecord] = {}
        self._lease_ids: dict[str, str] = {}
        self._released: dict[str, float] = {}
        self.xfer_stats = TransferStats()
        self.kv_bytes_received = 0
        """Bytes of KV that this worker has pulled since it started."""

    def _drop_progress_thread(self, vllm_config: Any) -> None:
        # NIXL's progress thread polls without pause, one core per worker. Without it UCX makes progress when the
        # engine steps, which it does while anything is pending. Nothing is registered with the first agent yet, so it
        # can be replaced.
        num_threads = vllm_config.kv_transfer_config.get_from_extra_config("num_threads", 4)
        config = nixl_agent_config(
            enable_prog_thread=False, num_threads=num_threads, backends=self.nixl_backends, capture_telemetry=True
        )
        self.nixl_wrapper = NixlWrapper(str(uuid.uuid4()), config)

    @property
    def rank(self) -> int:
        """Token-parallel rank; 0 in an engine without token parallelism."""
        return 0 if self._place is None else self._place.rank

    def start_load_kv(self, metadata: TokenParallelConnectorMetadata) -> None:
        now = time.time()
        base = 0 if self._place is None else self._place.base
        own = {}
        for request_id, meta in metadata.reqs_to_recv.items():
            pull = metadata.pulls[request_id]
            if pull.owner != self.rank:
                continue
            local = tuple([block_id - base for block_id in group] for group in meta.local_block_ids)
            own[request_id] = _OwnPull(**{**vars(meta), "local_block_ids": local}, num_readers=pull.num_readers)
            if any(local):
                self._begun[request_id] = now
        metadata.reqs_to_recv = own
        if self.rank != 0:
            # One worker's heartbeats keep the lease; the others only make the connection that they will pull over.
            for engine_id, peer in metadata.heartbeat_by_engine.items():
                self._ensure_handshake(engine_id, peer.host, peer.port, peer.tp_size, peer.dcp_size, peer.pp_size)
            metadata.heartbeat_by_engine = {}
        self._lease_ids.update(metadata.lease_ids)
        if self._begun or self._reqs_to_send:
            self._silence_limit.apply()
        super().start_load_kv(metadata)
        if metadata.idle and self._idle_pause:
            time.sleep(self._idle_pause)

    def _read_blocks_for_req(self, req_id: str, meta: _OwnPull) -> None:
        self._num_readers = meta.num_readers  # of the request whose reads are posted now
        super()._read_blocks_for_req(req_id, meta)

    def _read_blocks(self, *, expected_consumers: int, **kwargs: Any) -> bool:
        # The notification tells the prefill worker how many to wait for before it frees the blocks.
        return bool(super()._read_blocks(expected_consumers=expected_consumers * self._num_readers, **kwargs))

    def _handle_failed_transfer(self, req_id: str, *args: Any, **kwargs: Any) -> bool:
        # A connection that timed out stays dead, but NIXL 1.5 keeps the metadata by which vLLM sees that it has to
        # shake hands again (_cleanup_remote_engines): this rank would never pull from that engine again.
        meta = self._recving_metadata.get(req_id)
        if type(sys.exception()).__name__ == _DISCONNECTED and meta is not None and meta.remote is not None:
            engine_id = meta.remote.engine_id
            if engine_id in self._remote_agents and engine_id not in self._invalid_remote_engines:
                self._mark_remote_engine_invalid(engine_id, time.perf_counter())
        return bool(super()._handle_failed_transfer(req_id, *args, **kwargs))

    def _pop_done_transfers(self, transfers: dict[str, list[int]]) -> tuple[set[str], set[str]]:
        done: set[str] = set()
        failed: set[str] = set()
        sizes = self.xfer_stats.data["bytes_transferred"]
        for request_id in list(transfers):
            # One request at a time, to know whose the bytes are.
            mine = {request_id: transfers[request_id]}
            before = len(sizes)
            done_now, failed_now = super()._pop_done_transfers(mine)
            kv_bytes, count = self._pulled.get(request_id, (0, 0))
            self._pulled[request_id] = (kv_bytes + sum(sizes[before:]), count + len(sizes) - before)
            if request_id in mine:
                transfers[request_id] = mine[request_id]
            else:
                del transfers[request_id]
            done |= done_now
            failed |= failed_now
        return done, failed

    def get_transfer_results(self) -> Any:
        results = super().get_transfer_results()
        for request_id in results.finished_recving:
            begun, (kv_bytes, count) = self._begun.pop(request_id, None), self._pulled.pop(request_id, (0, 0))
            self.kv_bytes_received += kv_bytes
            if begun is None or request_id in results.failed_recving:
                continue
            record = TransferRecord(self.rank, kv_bytes, count, transfer_begin=begun, transfer_end=time.time())
            self._ended[request_id] = record
            self.xfer_stats.record_pull(record)
        return results

    def release_lease(self, lease_id: str) -> None:
        """Lets the KV cache under this lease go with the next step, or, if its request has not ended yet, when it does.
        Nobody may be reading it."""
        self._released[lease_id] = time.monotonic()

    def _reap_expired_send_leases(self, done_sending: set[str]) -> None:
        # Before vLLM's own: a lease that was released has not expired.
        if self._released:
            for request_id in [r for r in self._reqs_to_send if self._lease_ids.get(r) in self._released]:
                self.consumer_notification_counts_by_req.pop(request_id, None)
                self.expected_consumer_notifications_by_req.pop(request_id, None)
                self._reqs_to_process.discard(request_id)
                del self._reqs_to_send[request_id]
                done_sending.add(request_id)
            too_old = time.monotonic() - _RELEASE_SECONDS
            self._released = {lease: at for lease, at in self._released.items() if at > too_old}
        super()._reap_expired_send_leases(done_sending)
        if len(self._lease_ids) > len(self._reqs_to_send):
            self._lease_ids = {r: lease for r, lease in self._lease_ids.items() if r in self._reqs_to_send}

    def take_report(self) -> TransferReport | None:
        """The pulls that ended since the last call."""
        ended, self._ended = self._ended, {}
        return TransferReport(ended) if ended else None

    def get_block_ids_with_load_errors(self) -> set[int]:
        # The scheduler knows blocks by their global ids.
        base = 0 if self._place is None else self._place.base
        return {block_id + base for block_id in super().get_block_ids_with_load_errors()}
