"""The workers' half of the connector: the owning rank pulls a request's KV straight from the prefill ranks."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import ReqMeta
from vllm.logger import init_logger
from vllm.platforms import current_platform

from kv_transfer import checksums, spin
from kv_transfer.agent import make_agent
from kv_transfer.checksum_worker import ChecksumWorker
from kv_transfer.copies import Copies
from kv_transfer.direct.ids import RegionIds
from kv_transfer.handshakes import HandshakeExecutor, fetch_payload
from kv_transfer.identity import ROW_BYTES, HandshakePayload, LeaseTable, Offer
from kv_transfer.lease_check import LeaseChecks, QuietReads, Stale, Verdict
from kv_transfer.metadata import Ahead, TokenParallelConnectorMetadata, TransferRecord, TransferReport
from kv_transfer.metrics import TransferStats
from kv_transfer.packed.read import PeerLostError
from kv_transfer.path import choose_path
from tknp.common.partition import RankPlace, get_place
from tknp.common.silence import SilenceLimit

logger = init_logger(f"vllm.{__name__}")

_IDLE_PAUSE_SECONDS = 0.001
"""On CPU, how long a step that only polls transfers rests. vLLM's engine steps without pause while a transfer or a
lease is pending (v1/core/sched/scheduler.py, has_finished_requests), which would take a core from whoever
computes."""

_PROGRESS_REST_MICROSECONDS = 1_000
"""On CPU, how long NIXL's progress thread waits for an event (`progress_rest_us`)."""

_HANDSHAKE_SECONDS = 15.0
"""After which requests that wait for a prefill engine's handshake compute their prompts (`handshake_seconds`)."""
_WARM_UP_SECONDS = 1.0

_IDLE_WAIT_SECONDS = 0.005
"""How long a step that has nothing to compute waits for copies between GPUs, which take milliseconds. vLLM's engine
sleeps 1 ms before it asks again (v1/engine/core.py, _process_engine_step)."""

_CHECK_SECONDS = 0.0003
"""How long the check of KV cache that has just arrived is waited for: a small read, which takes tens of microseconds
where NIXL's progress thread does not rest, while the engine's next step may be milliseconds away."""

_RELEASE_SECONDS = 60.0
"""How long the release of a lease is remembered that is not held yet; the request behind it ends long before, or was
aborted."""

_DISCONNECTED = ("nixlRemoteDisconnectError", PeerLostError.__name__)
"""NIXL's exception, by name, since its module is called after the CUDA version, and ours."""


@dataclass
class _OwnPull(ReqMeta):
    """One of this rank's orders; see `Pull`."""

    num_readers: int = 1
    offer: Offer | None = None
    trusted_until: float | None = None


class TokenParallelConnectorWorker(ChecksumWorker):
    """vLLM's pull worker, restricted to the requests of its own rank."""

    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        spin.install()
        on_host = current_platform.is_cpu()
        affinity = os.sched_getaffinity(0)
        super().__init__(vllm_config, engine_id, kv_cache_config)
        if on_host:
            # vLLM pins this thread, which also computes, to the last core of each NUMA node, where all engines meet.
            os.sched_setaffinity(0, affinity)
        extra = vllm_config.kv_transfer_config.get_from_extra_config
        if rest := extra("progress_rest_us", _PROGRESS_REST_MICROSECONDS if on_host else 0):
            # Nothing is registered with the first agent yet, so it can be replaced.
            self.nixl_wrapper = make_agent(self.nixl_backends, extra("num_threads", 4), rest)
        self._path = choose_path(vllm_config, self.nixl_wrapper, self.use_host_buffer)
        agent: Any = QuietReads(self._path.agent)
        self.nixl_wrapper = agent
        self._checks = LeaseChecks(agent, needs_checksums=checksums.is_on())
        self._lease_table = LeaseTable()
        self._lease_slots: dict[str, int] = {}
        self._scratch = np.zeros(ROW_BYTES, dtype=np.uint8)
        vllm_executor: Any = self._handshake_initiation_executor
        vllm_executor.shutdown(wait=False)
        self._handshake_initiation_executor: Any = HandshakeExecutor(
            extra("handshake_seconds", _HANDSHAKE_SECONDS),
            lambda: self.xfer_stats.record_retry(self.rank),
            self._warm_up,
        )
        self._place: RankPlace | None = get_place()
        if self._place is not None:
            # Of those that hold the same requests: an engine whose weights are spread over all ranks has more workers
            # than its KV heads are divided among.
            self.tp_rank = self.transfer_tp_rank = self._place.shard
            self.world_size = self.transfer_tp_size = self._place.partition.num_shards
        self._idle_pause = _IDLE_PAUSE_SECONDS if on_host else 0.0
        self._check_patience = 0.0 if on_host else _CHECK_SECONDS
        self._reading = _OwnPull((), (), 1)
        self._offsets: dict[str, Any] = {}  # of regions, by what vLLM computes them of
        self._silence_limit = SilenceLimit()
        self._begun: dict[str, float] = {}
        self._pulled: dict[str, Copies] = {}
        self._ahead: dict[str, Ahead] = {}  # of streamed requests whose prefill has ended
        self._ended: dict[str, TransferRecord] = {}
        self._lease_ids: dict[str, str] = {}
        self._released: dict[str, float] = {}
        self.xfer_stats: TransferStats = TransferStats()
        self.xfer_stats.rank = self.rank
        self.kv_bytes_received = 0
        """Bytes of KV that this worker has pulled since it started."""

    @property
    def rank(self) -> int:
        """Token-parallel rank; 0 in an engine without token parallelism."""
        return 0 if self._place is None else self._place.rank

    def register_kv_caches(self, kv_caches: Any) -> None:
        # Before vLLM does, since what it then tells other engines is all that is registered.
        scratch = (self._scratch.ctypes.data, self._scratch.nbytes, 0, "")
        regions = [self._lease_table.region, self._checks.region, scratch]
        table = [self._lease_table.rows.ctypes.data, self._lease_table.epoch]
        if checksums.is_on():
            sums, reader = self._prepare_checksums(kv_caches, self.xfer_stats.record_compared)
            regions += [sums.region, reader.region]
            table += [sums.rows.ctypes.data, sums.num_heads]
        descs = self.nixl_wrapper.get_reg_descs(regions, "DRAM")
        self.nixl_wrapper.register_memory(descs, backends=self.nixl_backends)
        self._registered_descs.append(descs)
        super().register_kv_caches(kv_caches)
        payload = HandshakePayload(**vars(self.xfer_handshake_metadata), lease_table=tuple(table))
        self._path.offer(kv_caches, payload)
        self.xfer_handshake_metadata: Any = payload

    def _warm_up(self, host: str, port: int, worker: tuple[int, int], agent_name: str) -> None:
        """Reads the lease table's first row, since UCX connects at the first read, and sends a heartbeat that keeps
        nothing, since it also takes milliseconds to say something for the first time; a stock engine has no table.

        Where that fails the first request connects, so it fails nothing else.
        """
        try:
            table = fetch_payload(host, port, worker).lease_table
            if table:
                self._read_first_row(table[0], agent_name)
                self.nixl_wrapper.send_notif(agent_name, notif_msg=b"HB:")
        except Exception as error:  # noqa: BLE001 - whatever it is, the handshake was good
            logger.warning("prefill worker %d/%d at %s:%d was not read ahead: %r", *worker, host, port, error)

    def _read_first_row(self, address: int, agent_name: str) -> None:
        handle = self.nixl_wrapper.initialize_xfer(
            "READ",
            self.nixl_wrapper.get_xfer_descs([(self._scratch.ctypes.data, ROW_BYTES, 0)], "DRAM"),
            self.nixl_wrapper.get_xfer_descs([(address, ROW_BYTES, 0)], "DRAM"),
            agent_name,
        )
        self.nixl_wrapper.transfer(handle)
        deadline = time.monotonic() + _WARM_UP_SECONDS
        while self.nixl_wrapper.check_xfer_state(handle) == "PROC" and time.monotonic() < deadline:
            time.sleep(0.001)
        self.nixl_wrapper.release_xfer_handle(handle)

    def _nixl_handshake(
        self, host: str, port: int, *args: Any, **kwargs: Any
    ) -> tuple[dict[tuple[int, int], str], float]:
        agents, clock_offset = super()._nixl_handshake(host, port, *args, **kwargs)
        self._path.connect(host, port, agents)
        return agents, clock_offset

    def start_load_kv(self, metadata: TokenParallelConnectorMetadata) -> None:
        now = time.time()
        base = 0 if self._place is None else self._place.base
        own = {}
        for request_id, meta in metadata.reqs_to_recv.items():
            pull = metadata.pulls[request_id]
            if pull.owner != self.rank:
                continue
            local = meta.local_block_ids
            if base:
                local = tuple([block_id - base for block_id in group] for group in local)
            own[request_id] = _OwnPull(
                **{**vars(meta), "local_block_ids": local},
                num_readers=pull.num_readers,
                offer=pull.offer,
                trusted_until=pull.trusted_until,
            )
            if any(local):
                self._begun[request_id] = now
        metadata.reqs_to_recv = own
        if self.rank != 0:
            # One worker's heartbeats keep the lease; the others only make the connection that they will pull over.
            for engine_id, peer in metadata.heartbeat_by_engine.items():
                self._ensure_handshake(engine_id, peer.host, peer.port, peer.tp_size, peer.dcp_size, peer.pp_size)
            metadata.heartbeat_by_engine = {}
        self._lease_ids.update(metadata.lease_ids)
        elsewhere = {r for r, keeper in metadata.keepers.items() if keeper != self.rank}
        metadata.reqs_in_batch = metadata.reqs_in_batch - elsewhere
        self._reqs_to_process -= elsewhere  # where it was before it was preempted
        super().start_load_kv(metadata)
        for request_id, slot in metadata.lease_slots.items():
            if request_id in self._reqs_to_send:
                self._lease_slots[request_id] = slot
                if self._sum_table is not None:
                    self._sum_table.write(metadata.lease_blocks[request_id])
                    self._lease_table.mark_ready(slot)
            else:  # it was read to its end before this worker heard that it was kept, or another rank keeps it
                self._lease_table.end(slot)
        if self._begun or self._reqs_to_send:
            self._silence_limit.apply()  # it takes milliseconds, so under the reads that were posted
        spin.rest(metadata.idle and bool(self._reqs_to_send) and not self._begun)
        if metadata.idle:
            self._path.settle(_IDLE_WAIT_SECONDS)
            if self._idle_pause:
                time.sleep(self._idle_pause)

    def _read_blocks_for_req(self, req_id: str, meta: _OwnPull) -> None:
        self._reading = meta  # the request whose reads are posted now
        super()._read_blocks_for_req(req_id, meta)

    def _compute_desc_ids(self, block_ids: Any, **caches: Any) -> Any:
        if not self._path.takes_regions or len(block_ids) != 1 or self._has_mamba:
            return super()._compute_desc_ids(block_ids, **caches)
        # With one group, ids are sums of a region's offset and a block; those of block 0 are the offsets. They are
        # the same for all prompts of one engine, and take a tenth of a millisecond.
        key = str(caches)
        if key not in self._offsets:
            self._offsets[key] = super()._compute_desc_ids(([0],), **caches).astype(np.int32)
        return RegionIds(self._offsets[key], np.asarray(block_ids[0], dtype=np.int32))

    def _read_blocks(self, *, read_spec: Any, request_id: str, expected_consumers: int, **kwargs: Any) -> bool:
        # The notification tells the prefill worker how many to wait for before it frees the blocks.
        kwargs |= {"read_spec": read_spec, "request_id": request_id}
        kwargs["expected_consumers"] = expected_consumers * self._reading.num_readers
        offer = self._reading.offer
        if offer is None or not any(read_spec.local_block_ids):
            return bool(super()._read_blocks(**kwargs))
        with self.nixl_wrapper.quiet():
            is_posted = bool(super()._read_blocks(**kwargs))
        if is_posted:
            worker = (0, read_spec.remote_rank)
            agent_name = self._remote_agents[kwargs["dst_engine_id"]][worker]
            self._checks.expect(request_id, offer, worker, agent_name)
            if self._sum_reader is not None and offer.tables[worker].checksums:
                self._expect_checksums(request_id, read_spec, offer, kwargs["dst_engine_id"])
            # As vLLM's own, which it sends when the request is done.
            notification = f"{kwargs['remote_request_id']}:{kwargs['expected_consumers']}".encode()
            self._pending_recv_notifs.setdefault(request_id, []).append((agent_name, notification))
        return is_posted

    def _handle_failed_transfer(self, req_id: str, *args: Any, **kwargs: Any) -> bool:
        # A connection that timed out stays dead, but NIXL 1.5 keeps the metadata by which vLLM sees that it has to
        # shake hands again (_cleanup_remote_engines): this rank would never pull from that engine again.
        meta = self._recving_metadata.get(req_id)
        if type(sys.exception()).__name__ in _DISCONNECTED and meta is not None and meta.remote is not None:
            engine_id = meta.remote.engine_id
            if engine_id in self._remote_agents and engine_id not in self._invalid_remote_engines:
                self._mark_remote_engine_invalid(engine_id, time.perf_counter())
        return bool(super()._handle_failed_transfer(req_id, *args, **kwargs))

    def _pop_done_transfers(self, transfers: dict[str, list[int]]) -> tuple[set[str], set[str]]:
        done: set[str] = set()
        failed: set[str] = set()
        stats = self.xfer_stats.data
        for request_id in list(transfers):
            # One request at a time, to know whose the bytes are.
            mine = {request_id: transfers[request_id]}
            before = len(stats["bytes_transferred"])
            done_now, failed_now = super()._pop_done_transfers(mine)
            self._pulled[request_id] = self._pulled.get(request_id, Copies()).and_those(stats, before)
            failed |= failed_now
            if request_id in mine:
                transfers[request_id] = mine[request_id]
            elif not self._is_settled(request_id, failed):
                transfers[request_id] = []
            else:
                del transfers[request_id]
                done |= done_now
        return done, failed

    def _is_settled(self, request_id: str, failed: set[str]) -> bool:
        """Whether it is known what all the bytes of a request, which have arrived, are worth; if nothing, it is put
        among the failed."""
        if request_id in failed or request_id in self._recv_failures:
            self._checks.drop(request_id)
            if self._sum_reader is not None:
                self._sum_reader.drop(request_id)
            # Nothing reads there any more. The others of the engine's pulls go on, so this is no time to raise.
            self._send_pending_recv_notifs(request_id)
            return True
        meta = self._recving_metadata.get(request_id)
        if meta is not None and meta.trusted_until is not None and time.time() > meta.trusted_until:
            self._reject(request_id, Stale.TOO_LATE, failed)
        if request_id not in self._checks:
            return True
        verdict = self._checks.poll(request_id, self._check_patience)
        if verdict is Verdict.FAILED:
            self._handle_failed_transfer(request_id, None, failed)
        elif verdict not in (Verdict.PENDING, Verdict.HELD):
            self._reject(request_id, Stale(verdict.value), failed)
        elif verdict is Verdict.HELD and self._sum_reader is not None:
            self._compare_checksums(self._sum_reader, request_id, failed)
        return verdict is not Verdict.PENDING

    def _compare_checksums(self, reader: checksums.ChecksumReader, request_id: str, failed: set[str]) -> None:
        try:
            is_same = reader.num_differing(request_id) == 0
        except Exception as error:  # noqa: BLE001 - NIXL's have no common class; all mean that the peer is gone
            logger.warning("request %s: its checksums could not be read: %r", request_id, error)
            self._handle_failed_transfer(request_id, None, failed)
            return
        if not is_same:
            self._reject(request_id, Stale.CHECKSUM, failed)
            self._send_pending_recv_notifs(request_id)  # unlike others, this lease is held still

    def _reject(self, request_id: str, reason: Stale, failed: set[str]) -> None:
        logger.warning(
            "request %s computes its prompt: the KV cache that it pulled may be another's by now (%s)",
            request_id,
            reason.value,
        )
        if self._sum_reader is not None:
            self._sum_reader.drop(request_id)
        self.xfer_stats.record_stale(self.rank, reason, self._pulled.get(request_id, Copies()).path)
        self._begun.pop(request_id, None)  # the pull itself did not fail
        failed.add(request_id)

    def get_transfer_results(self) -> Any:
        results = super().get_transfer_results()
        for request_id in results.finished_recving:
            begun, copies = self._begun.pop(request_id, None), self._pulled.pop(request_id, Copies())
            self.kv_bytes_received += copies.kv_bytes
            ahead = self._ahead.pop(request_id, Ahead())
            if begun is not None and request_id in results.failed_recving:
                self.xfer_stats.record_failure(self.rank)
            elif begun is not None:
                self._ended[request_id] = record = TransferRecord.of(self.rank, copies, begun, ahead)
                self.xfer_stats.record_pull(record)
        for request_id in results.finished_sending:
            # Before the scheduler hears of it, and so before anybody can write to these blocks.
            if (slot := self._lease_slots.pop(request_id, None)) is not None:
                self._lease_table.end(slot)
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

    def shutdown(self) -> None:
        if hasattr(self, "_checks"):
            self._checks.shutdown()
            self._path.close()
        super().shutdown()

    def get_block_ids_with_load_errors(self) -> set[int]:
        # The scheduler knows blocks by their global ids.
        base = 0 if self._place is None else self._place.base
        return {block_id + base for block_id in super().get_block_ids_with_load_errors()}
