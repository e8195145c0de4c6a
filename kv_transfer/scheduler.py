"""The scheduler's half of the connector: decides, with the block pools, which rank each request's KV belongs to."""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler
from vllm.logger import init_logger
from vllm.platforms import current_platform

from kv_transfer import checksums
from kv_transfer.handover import HandOverClock
from kv_transfer.identity import OFFER_PARAM, LeaseSlots, Offer, prompt_digest
from kv_transfer.lease_check import Stale
from kv_transfer.metadata import Pull, TokenParallelConnectorMetadata, TransferRecord
from kv_transfer.metrics import TransferStats
from kv_transfer.rank_offers import RankOffers, of_rank
from kv_transfer.stream_source import StreamSource
from tknp.common.partition import get_partition
from tknp.common.ports import wait_until_free

logger = init_logger(f"vllm.{__name__}")

REQUEST_ID_PARAM = "tknp_request_id"
"""Key in `kv_transfer_params` under which the router names the request; transfer records are kept under it."""
NUM_READERS_PARAM = "tknp_num_readers"
"""Key in `kv_transfer_params`: the `n` of the client's request."""
LEASE_ID_PARAM = "tknp_lease_id"
"""Key in `kv_transfer_params` of a prefill leg: the router's name for the KV cache that is then kept."""

PULLED_BACK_PARAM = "tknp_pulled_back"
"""Key in a prefill engine's answer, true if it pulled what the request brought an offer of, and so ended its lease."""

STREAM_PARAM = "tknp_stream"
"""Key in `kv_transfer_params`: of a prefill leg, true if it is to be streamed (kv_transfer.stream_source); of a decode
leg that is sent beside it, the stream's name, which is the lease's."""
_PEER_PARAMS = ("remote_engine_id", "remote_host", "remote_port", "tp_size")

_CHILD = re.compile(r"\d+_")

_TRUSTED_SHARE = 2 / 3
"""Of a stock prefill engine's lease, from the request's arrival at this engine's server. The lease began before that,
on the other engine, and whether heartbeats reached it, which would renew it, nobody knows. In an engine that is held
up, the request may come here, and the order to a rank, much later than that."""

_STEP_REST_SECONDS = 0.001
"""vLLM's own."""
_PULL_REST_SECONDS = 0.0001
"""While KV cache is under way between GPUs; others' threads need the interpreter, too."""
_LEASE_REST_SECONDS, _MAX_LEASE_REST_SECONDS = 0.05, 1.0
"""While nothing is left but leases, and blocks that something still writes to, at first and at most; that much later
they are free. A request, or a release, ends the rest at once."""
_REST_SHARE = 0.25
"""Of the time since a request has ended."""
_LISTEN_AGAIN_SECONDS = 0.1
_PORT_PATIENCE_SECONDS = 30.0
"""The engine that had the port before may not have ended yet."""

_MAX_RECORDS = 4096
"""Transfer records kept for whoever asks; the oldest go first."""


def _num_readers(request_id: str, params: dict[str, Any]) -> int:
    # vLLM splits a request with `n` sequences into children called `<index>_<id>` (v1/engine/parallel_sampling.py);
    # each reads the offered KV. One that it refuses before the split, to let the prefill engine go, speaks for all of
    # them.
    num_readers = params.get(NUM_READERS_PARAM, 1)
    # It comes in over HTTP: nonsense must not end the engine.
    return num_readers if isinstance(num_readers, int) and num_readers > 0 and _CHILD.match(request_id) else 1


def _stream_of(params: dict[str, Any] | None) -> str | None:
    """Of a decode leg's request."""
    name = (params or {}).get(STREAM_PARAM)
    return name if isinstance(name, str) else None


def _is_peer(params: dict[str, Any]) -> bool:
    """Whether an offer says, in values of the right kinds, where it is to be had."""
    texts = (params.get(name) for name in ("remote_engine_id", "remote_request_id", "remote_host"))
    numbers = [params.get("remote_port"), *(params.get(name, 1) for name in ("tp_size", "dcp_size", "pp_size"))]
    return all(isinstance(one, str) for one in texts) and all(type(one) is int and one > 0 for one in numbers)


def _is_pulled_back(params: dict[str, Any] | None) -> bool:
    """Whether a prefill leg brings an offer of its prompt's beginning, as of a decode engine that has it."""
    return bool(params and params.get("do_remote_decode") and params.get("remote_block_ids"))


class TokenParallelConnectorScheduler(NixlPullConnectorScheduler):
    """vLLM's pull scheduler, with an owner for every pull."""

    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        self._partition = get_partition()
        transfer = vllm_config.kv_transfer_config
        self._ranks: RankOffers | None = None
        if self._partition is not None and transfer.is_kv_producer:
            self._ranks = RankOffers(self._partition, engine_id)
        # A step that still writes to blocks must not meet a pull to them; see services.compatibility.kv_roles. What is
        # computed once more behind a pull must not change what was pulled, as the state of a Mamba layer.
        self._prefills_after_pull = (
            transfer.is_kv_producer
            and transfer.is_kv_consumer
            and not self.use_host_buffer
            and not self._prefill_backoff()
        )
        self._pulled_back: dict[str, bool] = {}  # of a request that brought an offer: whether all of it is here
        self._owners: dict[str, int] = {}
        self._names: dict[str, str] = {}
        self._lease_ids: dict[str, str] = {}
        self._slots = LeaseSlots()
        self._sums_blocks = checksums.is_on()
        self._lease_blocks: dict[str, Any] = {}
        self._refused: set[str] = set()
        self._handovers = HandOverClock()
        self._source: StreamSource | None = None
        self._num_steps = 0
        self._ended_streams: set[str] = set()
        self._last_ended = 0.0  # when a request did, by time.monotonic()
        self._has_arrived = False  # KV cache, since the last step was scheduled
        self._stats = TransferStats()
        self.records: OrderedDict[str, TransferRecord] = OrderedDict()

    def set_xfer_handshake_metadata(self, metadata: dict[tuple[int, int], Any]) -> None:
        self._slots.know(metadata)
        if self._partition is None and self._source is None and self.vllm_config.kv_transfer_config.is_kv_producer:
            is_plain = not (self._is_hma_required or self._has_mamba or self.use_host_buffer)
            self._source = StreamSource(self.side_channel_host, is_plain)
            for payload in metadata.values():
                payload.streams = self._source.address
        # vLLM would wait for its listener for ever.
        wait_until_free(self.side_channel_host, self.side_channel_port, _PORT_PATIENCE_SECONDS)
        super().set_xfer_handshake_metadata(metadata if self._partition is None else of_rank(metadata, 0))
        if self._ranks is not None:
            address = self.side_channel_host, self.side_channel_port
            self._ranks.listen(metadata, self._nixl_handshake_listener, self._stop_event, address)

    @staticmethod
    def _nixl_handshake_listener(
        encoded_data: dict[tuple[int, int], Any],
        ready_event: threading.Event,
        stop_event: threading.Event,
        host: str,
        port: int,
    ) -> None:
        # vLLM's ends at the first question that it can't answer, such as one about a worker that there is none of since
        # the engine was started again with fewer. Nobody could shake hands with this engine any more.
        told = ""
        while not stop_event.is_set():
            try:
                NixlPullConnectorScheduler._nixl_handshake_listener(encoded_data, ready_event, stop_event, host, port)
            except Exception as error:  # noqa: BLE001 - whatever a peer sent, or the port, not free again yet
                if told != (told := repr(error)):  # a port that is taken is tried for as long as it is
                    logger.warning("the side channel %s:%d did not answer, and listens again: %s", host, port, told)
                stop_event.wait(_LISTEN_AGAIN_SECONDS)

    def on_new_request(self, request: Any) -> None:
        params = request.kv_transfer_params
        if self._partition is not None and self._ranks is None and params and params.get("do_remote_decode"):
            logger.warning(
                "request %s wants its KV cache kept, which a decode engine does only with --kv-both", request.request_id
            )
            request.kv_transfer_params = None
        stream = _stream_of(params)
        if params and stream and all(name in params for name in _PEER_PARAMS):
            # What vLLM wants to see in an offer. The prefill worker knows its leases by the router's names, too.
            params |= {"remote_block_ids": [[]], "remote_request_id": stream}
        super().on_new_request(request)
        if params and params.get("do_remote_prefill"):
            self._examine(request, params)
        elif _is_pulled_back(request.kv_transfer_params):
            self._examine_pulled_back(request)
        wanted = request.kv_transfer_params or {}
        if self._source is not None and wanted.get("do_remote_decode") and wanted.get(STREAM_PARAM) is True:
            self._source.open(request.request_id, str(wanted.get(LEASE_ID_PARAM)))

    def _examine(self, request: Any, params: dict[str, Any]) -> None:
        offer = Offer.from_param(params.get(OFFER_PARAM))
        if _stream_of(params):
            if "remote_request_id" not in params:
                self._refuse(request, f"its stream comes without one of {', '.join(_PEER_PARAMS)}")
        elif offer is not None and offer.prompt != prompt_digest(request.prompt_token_ids or ()):
            self._stats.record_stale(0, Stale.OTHER_PROMPT)
            self._refuse(request, "it belongs to another prompt")
        if params.get("pp_size", 1) != 1:
            # vLLM's pull connector reads from one stage of a pipeline only.
            self._refuse(request, f"the prefill engine is a pipeline of {params['pp_size']} stages")

    def _examine_pulled_back(self, request: Any) -> None:
        params, tokens = request.kv_transfer_params, request.prompt_token_ids or ()
        offer, num_tokens = Offer.from_param(params.get(OFFER_PARAM)), params.get("remote_num_tokens")
        is_whole = offer is not None and _is_peer(params) and self._has_blocks_of(params, num_tokens)
        if not self._prefills_after_pull or not is_whole:
            # Not so much is sure as whom to tell: its lease ends by itself, or the router ends it.
            params["remote_block_ids"] = None
            reason = "its offer is not whole" if self._prefills_after_pull else "this engine does not pull (--kv-both)"
            logger.warning("request %s computes its prompt, of which a rank keeps some: %s", request.request_id, reason)
        elif offer is not None and offer.prompt != prompt_digest(tokens[:num_tokens]):
            self._stats.record_stale(0, Stale.OTHER_PROMPT)
            self._refuse(request, "it belongs to another prompt")
        else:
            # As with an offer of a prefill engine; vLLM keeps leases alive for those only.
            asked = SimpleNamespace(
                request_id=request.request_id,
                kv_transfer_params={**params, "do_remote_prefill": True, "do_remote_decode": False},
            )
            super().on_new_request(asked)

    def _has_blocks_of(self, params: dict[str, Any], num_tokens: Any) -> bool:
        groups = params["remote_block_ids"]
        return (
            isinstance(num_tokens, int)
            and num_tokens > 0
            and isinstance(groups, list | tuple)
            and len(groups) == len(self.kv_cache_config.transfer_groups)
            and all(isinstance(ids, list) and all(type(one) is int and one >= 0 for one in ids) for ids in groups)
            # Its blocks are as large as those here, or smaller.
            and max(map(len, groups)) * self.block_size >= num_tokens
        )

    def _refuse(self, request: Any, reason: str) -> None:
        logger.warning("request %s computes its prompt, whose KV cache is not pulled: %s", request.request_id, reason)
        self._refused.add(request.request_id)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        params = request.kv_transfer_params or {}
        # vLLM asks again for one that was preempted, or whose pull failed, and would wait for ever.
        was_pulled = params.get("do_remote_decode") and params.get("_remote_blocks_processed")
        if was_pulled or request.request_id in self._refused:
            # As with a prompt that is all here, the prefill engine is then told that it can let its KV go.
            return 0, False
        matched: tuple[int, bool] = super().get_num_new_matched_tokens(request, num_computed_tokens)
        return matched

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        is_pulling_back = self._prefills_after_pull and _is_pulled_back(request.kv_transfer_params)
        # vLLM's name for what a decode engine keeps after each answer; here it is what a request brings with it.
        self.is_bidirectional_kv_xfer_enabled = is_pulling_back
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        self.is_bidirectional_kv_xfer_enabled = False
        request_id = request.request_id
        self._refused.discard(request_id)
        is_read, is_kept = request_id in self._reqs_need_recv, request_id in self._reqs_in_batch
        if is_pulling_back and is_read:
            # Where all of it is here, its rank is only told so.
            self._pulled_back[request_id] = not num_external_tokens
        if self._partition is not None and (is_read or (is_kept and self._ranks is not None)):
            # Prefix hits are among the blocks, so that a request whose KV is all here already has an owner too.
            owner = self._partition.rank_of_all(b.block_id for group in blocks.blocks for b in group) or 0
            if is_read:
                self._owners[request_id] = owner
            if is_kept and self._ranks is not None:
                self._ranks.place(request_id, owner)

    def build_connector_meta(self, scheduler_output: Any) -> TokenParallelConnectorMetadata:
        requests = {r: request for r, (request, *_) in self._reqs_need_recv.items()}
        for handover in self._handovers.start(scheduler_output.num_scheduled_tokens):
            self._stats.record_handover(handover)
        self._has_arrived = False
        base = super().build_connector_meta(scheduler_output)
        pulls = {}
        for request_id, meta in base.reqs_to_recv.items():
            params = requests[request_id].kv_transfer_params or {}
            has_blocks = any(meta.local_block_ids)
            if has_blocks:
                self._names[request_id] = str(params.get(REQUEST_ID_PARAM, request_id))
                self._handovers.order(request_id, requests[request_id].arrival_time)
            offer, stream = Offer.from_param(params.get(OFFER_PARAM)), _stream_of(params)
            is_stock = has_blocks and offer is None and not stream
            trusted_seconds = self._kv_lease_duration * _TRUSTED_SHARE
            pulls[request_id] = Pull(
                # A request that is aborted before it got blocks has none to fill, but exactly one rank must tell the
                # prefill engine that it can let its KV go: the root.
                owner=self._owners.pop(request_id, 0),
                num_readers=_num_readers(request_id, params),
                offer=offer,
                trusted_until=requests[request_id].arrival_time + trusted_seconds if is_stock else None,
                stream=stream,
                prompt=prompt_digest(requests[request_id].prompt_token_ids or ()) if stream else "",
            )
        lease_ids, self._lease_ids = self._lease_ids, {}
        ended, self._ended_streams = self._ended_streams, set()
        self._num_steps += 1
        chunks = {} if self._source is None else self._source.schedule(self._num_steps, scheduler_output)
        return TokenParallelConnectorMetadata(
            base,
            pulls,
            lease_ids,
            idle=scheduler_output.total_num_scheduled_tokens == 0,
            lease_slots={r: self._slots.slot_of(r) for r in base.reqs_to_send},
            lease_blocks={r: self._lease_blocks.pop(r, ()) for r in base.reqs_to_send} if self._sums_blocks else None,
            step=self._num_steps if self._source is not None and self._source.has_streams else None,
            ended=ended,
            chunks=chunks,
            keepers={r: self._ranks.keeper_of(r) for r in base.reqs_in_batch} if self._ranks is not None else None,
        )

    def update_connector_output(self, connector_output: Any) -> None:
        super().update_connector_output(connector_output)
        report = connector_output.kv_connector_worker_meta
        for request_id, record in (report.records if report is not None else {}).items():
            self._handovers.complete(request_id, record)
            # Several sequences of one client request (`n`) count together, and so do tensor-parallel workers.
            name = self._names.get(request_id, request_id)
            known = self.records.get(name)
            self.records[name] = record if known is None else known.merged_with(record)
            if len(self.records) > _MAX_RECORDS:
                self.records.popitem(last=False)
        self._has_arrived |= bool(connector_output.finished_recving)
        for request_id in connector_output.finished_recving or ():
            self._names.pop(request_id, None)
            if request_id in self._pulled_back:
                self._pulled_back[request_id] = request_id not in (connector_output.failed_recving or ())
        for request_id in connector_output.failed_recving or ():
            self._handovers.forget(request_id)
        self._slots.end(connector_output.finished_sending or ())
        if self._source is not None:
            if report is not None and report.step is not None:
                self._source.computed(report.step)
            self._source.forget(connector_output.finished_sending or ())

    def rest_seconds(self, has_unfinished: bool) -> float:
        """For which the engine rests after a step that computed nothing.

        Args:
            has_unfinished: requests, which wait for their KV cache or for room.
        """
        if self._has_arrived:
            return 0.0
        if not has_unfinished:
            age = time.monotonic() - self._last_ended
            return min(max(_LEASE_REST_SECONDS, _REST_SHARE * age), _MAX_LEASE_REST_SECONDS)
        return _PULL_REST_SECONDS if self._names and not current_platform.is_cpu() else _STEP_REST_SECONDS

    def take_stats(self) -> TransferStats:
        """What this half has counted since the last call."""
        taken: TransferStats = self._stats.clone_and_reset()
        return taken

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        request_id = request.request_id
        self._last_ended = time.monotonic()
        self._owners.pop(request_id, None)
        self._refused.discard(request_id)
        was_pulled_back = self._pulled_back.pop(request_id, False)
        self._handovers.forget(request_id)
        wanted = request.kv_transfer_params or {}
        if wanted.get("do_remote_decode") and not self._slots.has_room:
            logger.warning("request %s: its KV cache is not kept, since %d others are", request_id, len(self._slots))
            request.kv_transfer_params = None
        if _stream_of(wanted):
            # One that never got blocks has no offer to give back: the router does, by the lease's name.
            wanted["do_remote_prefill"] = False
            self._ended_streams.add(request_id)
        is_kept, params = super().request_finished(request, block_ids)
        rank = 0
        if self._ranks is not None:
            rank = self._ranks.keeper_of(request_id)
            self._ranks.forget(request_id)
        if is_kept and params is not None:
            if self._ranks is not None:
                params = self._ranks.as_of_rank(params, rank)
            if was_pulled_back:
                params[PULLED_BACK_PARAM] = True
            params[OFFER_PARAM] = self._slots.take(request_id, request.prompt_token_ids or (), rank).to_param()
            if self._sums_blocks:
                self._lease_blocks[request_id] = params["remote_block_ids"]
            if isinstance(lease_id := wanted.get(LEASE_ID_PARAM), str):
                self._lease_ids[request_id] = lease_id
        if self._source is not None:
            self._source.finish(request_id, params if is_kept else None)
        return is_kept, params

    def shutdown(self) -> None:
        if self._source is not None:
            self._source.close()
        super().shutdown()
        if self._ranks is not None:
            self._ranks.close()
