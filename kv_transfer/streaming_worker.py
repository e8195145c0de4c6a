"""The workers' half of the connector, with requests whose prefill engine still computes: what is complete is pulled at
once, the rest, and always the last block, when the prefill engine has made its offer. That last pull is one as any
other, with its check and its notification; until it is done nothing that was pulled before counts."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

from vllm import envs
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
from vllm.logger import init_logger
from vllm.platforms import current_platform

from kv_transfer.copies import Copies
from kv_transfer.handshakes import fetch_payload
from kv_transfer.identity import OFFER_PARAM, Offer
from kv_transfer.layer_source import LayerSource
from kv_transfer.lease_check import Stale
from kv_transfer.metadata import Ahead, TokenParallelConnectorMetadata, TransferReport
from kv_transfer.side_channel import SideChannel
from kv_transfer.stream_reader import StreamReader, StreamState
from kv_transfer.worker import TokenParallelConnectorWorker

logger = init_logger(f"vllm.{__name__}")

_WHOLE = ()
"""Of a part: all regions."""

_STREAM_SECONDS = 30.0
"""After which a stream of which nothing more is heard is given up (`stream_seconds`). Its prompt waits where there is
no room for it, perhaps because those that were computed wait for the room that it has here; or it was forgotten."""


@dataclass
class _StreamedPull:
    """A request's pull, from its order to its prefill's end.

    Attributes:
        meta: the order; None until the prefill engine's handshake is done.
        state: what the stream says; so too.
        num_held: blocks here, before those of the order, that a prefix hit filled.
        generation, pulled: the stream's, and the blocks there that were read of it, which follow those of the hit.
        ahead, num_regions: the blocks after these, of which so many regions were read.
        layers: what each prefill worker that is read from says; empty if one of them says nothing.
    """

    name: str
    prompt: str
    ordered: float  # by time.monotonic()
    meta: Any = None
    state: StreamState | None = None
    num_held: int = 0
    generation: int = 0
    pulled: list[int] = field(default_factory=list)
    ahead: list[int] = field(default_factory=list)
    num_regions: int = 0
    layers: list[StreamState] = field(default_factory=list)
    is_cancelled: bool = False

    @property
    def heard(self) -> float:
        """When its prefill engine said something last, or was asked to."""
        return max((self.ordered, *(state.heard for state in (self.state, *self.layers) if state)))

    def chunk(self) -> StreamState | None:
        """What all the workers have computed some layers of, if they are at the same chunk."""
        if len({(one.generation, one.num_tokens_before, one.num_tokens) for one in self.layers}) != 1:
            return None
        least = min(self.layers, key=lambda one: one.num_regions)
        return least if least.num_regions and least.generation == self.generation else None


class StreamingConnectorWorker(TokenParallelConnectorWorker):
    """See the module."""

    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        self._stream_seconds = vllm_config.kv_transfer_config.get_from_extra_config("stream_seconds", _STREAM_SECONDS)
        # Of prefill engines: where they tell of streams, their schedulers and their workers by tensor-parallel rank.
        self._addresses: dict[str, tuple[str, dict[int, str]]] = {}
        self._reader = StreamReader()
        self._streamed: dict[str, _StreamedPull] = {}
        self._part: tuple[int, int, int] | tuple[()] | None = None  # that is read now, which is not the last
        self._step: int | None = None
        self.side_channel: SideChannel | None = None
        self._layers: LayerSource | None = None

    def register_kv_caches(self, kv_caches: Any) -> None:
        super().register_kv_caches(kv_caches)
        transfer = self.vllm_config.kv_transfer_config
        if not transfer.is_kv_producer:
            return
        self.side_channel = SideChannel(envs.VLLM_NIXL_SIDE_CHANNEL_HOST)
        self.xfer_handshake_metadata.side_channel = self.side_channel.address
        on_gpu = not current_platform.is_cpu()
        # Micro-batches pass each layer one after the other.
        is_layered = set(self.region_names) == set(kv_caches) and not self.vllm_config.parallel_config.use_ubatching
        is_layered &= not self.use_host_buffer  # which is filled after the step
        is_layered &= self._place is None  # ranks offer what is complete
        if is_layered and transfer.get_from_extra_config("stream_layers", on_gpu):
            self._layers = LayerSource(self.side_channel, self.region_names, on_gpu)
            self.xfer_handshake_metadata.tells_layers = True

    def save_layer(self, layer_name: str, orders: Any) -> None:
        """See LayerSource.saved."""
        if self._layers is not None and orders.chunks:
            self._layers.saved(layer_name, orders)

    # -- orders --

    def start_load_kv(self, metadata: TokenParallelConnectorMetadata) -> None:
        self._step = metadata.step
        now = time.monotonic()
        for request_id, pull in metadata.pulls.items():
            if pull.stream and pull.owner == self.rank:
                self._streamed[request_id] = _StreamedPull(pull.stream, pull.prompt, now)
        for request_id in metadata.ended & self._streamed.keys():
            # One that pulls nothing waits for the end all the same, to say that nothing has to be kept for it.
            self._streamed[request_id].is_cancelled = request_id in self._recving_metadata
        # First, since a step with nothing to compute then waits a little for what is read.
        self._advance_streams()
        super().start_load_kv(metadata)

    def _nixl_handshake(self, host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        made = super()._nixl_handshake(host, port, *args, **kwargs)
        try:
            agents, _ = made
            told = {rank: fetch_payload(host, port, (stage, rank)) for stage, rank in agents}
            workers = {rank: payload.side_channel for rank, payload in told.items() if payload.tells_layers}
            self._addresses[args[1]] = next(iter(told.values())).streams, workers
        except Exception as error:  # noqa: BLE001 - whatever it is, this engine's offers can be read without
            logger.warning("prefill engine %s did not say where it streams: %r", args[1], error)
        return made

    def _read_blocks_for_req(self, req_id: str, meta: Any) -> None:
        streamed = self._streamed.get(req_id)
        engine_id = meta.remote.engine_id
        is_connected = engine_id in self._remote_agents and engine_id not in self._invalid_remote_engines
        if streamed is None or not is_connected:
            if is_connected and any(meta.local_block_ids) and self._ratio(meta) > 1:
                self._skip_held(meta)
            super()._read_blocks_for_req(req_id, meta)
            return
        if meta.awaiting_kvs:
            self._recving_transfers.setdefault(req_id, [])
        streamed.meta, streamed.num_held = meta, sum(meta.local_num_computed_blocks[:1])
        try:
            address, workers = self._addresses.get(engine_id, ("", {}))
            streamed.state = self._reader.subscribe(address, streamed.name)
            sources = [workers.get(rank, "") for rank in self.tp_mappings[engine_id].all_source_ranks]
            if all(sources) and not self._transfer_layer_group_ids:
                streamed.layers = [self._reader.subscribe(source, streamed.name) for source in sources]
        except ValueError as error:
            self._give_up(req_id, str(error))

    def _skip_held(self, meta: Any) -> None:
        """Leaves out of what was offered the blocks that a prefix hit filled here. vLLM takes as many of the last
        blocks there as blocks here have parts (_apply_prefix_caching), also where the last block here is not full."""
        num_held = sum(meta.local_num_computed_blocks[:1]) * self._ratio(meta)
        meta.remote = replace(meta.remote, block_ids=(list(meta.remote.block_ids[0])[num_held:],))

    # -- progress --

    def get_transfer_results(self) -> Any:
        results = super().get_transfer_results()
        for request_id in results.failed_recving:
            self._ahead.pop(request_id, None)
            if request_id in self._streamed:
                self._drop(request_id)
        return results

    def take_report(self) -> TransferReport | None:
        report = super().take_report()
        return report if self._step is None else TransferReport(report.records if report else {}, self._step)

    def _advance_streams(self) -> None:
        if self._streamed:
            self._reader.poll()
            for request_id in list(self._streamed):
                self._advance(request_id, self._streamed[request_id])

    def _advance(self, request_id: str, streamed: _StreamedPull) -> None:
        state, is_late = streamed.state, time.monotonic() > streamed.heard + self._stream_seconds
        if request_id in self._recv_failures:
            self._drop(request_id)
        elif state is None:  # the handshake, which has a time limit of its own, is under way
            if is_late and request_id not in self._recving_metadata:
                self._drop(request_id)
        elif streamed.is_cancelled:
            self._give_up(request_id, None)
        elif is_late:
            self._give_up(request_id, f"nothing more of it was heard for {self._stream_seconds:.0f} s")
        elif state.end is not None:
            self._end(request_id, streamed, state)
        elif state.is_over:
            self._give_up(request_id, "the prefill engine has given it up, or is gone")
        elif self._is_current(request_id, streamed, state):
            self._read_part(request_id, streamed, state)

    def _is_current(self, request_id: str, streamed: _StreamedPull, state: StreamState) -> bool:
        """Whether what was read is of the same generation as what is told now; if not, it is forgotten as soon as
        nothing of it is under way, which could arrive after what comes next."""
        if streamed.generation != state.generation and not self._recving_transfers.get(request_id):
            streamed.generation, streamed.pulled, streamed.ahead = state.generation, [], []
        return streamed.generation == state.generation

    def _read_part(self, request_id: str, streamed: _StreamedPull, state: StreamState) -> None:
        """Reads what is complete, and of what comes after it the layers that are there."""
        meta = streamed.meta
        ratio = self._ratio(meta)
        if not ratio or not any(meta.local_block_ids):
            return
        num_tokens, block_ids, chunk = state.num_tokens, state.block_ids, streamed.chunk()
        if chunk is not None and chunk.num_tokens > num_tokens:
            num_tokens, block_ids = max(num_tokens, chunk.num_tokens_before), chunk.block_ids
        there = block_ids[streamed.num_held * ratio :]
        end, begin = self._num_blocks(meta, num_tokens, streamed) * ratio, len(streamed.pulled)
        if end > begin:
            self._finish_ahead(request_id, streamed, end)
            self._read_some(request_id, meta, len(streamed.pulled), there[len(streamed.pulled) : end])
            streamed.pulled += there[len(streamed.pulled) : end]
        if chunk is None or request_id in self._recv_failures:
            return
        ahead = there[len(streamed.pulled) : self._num_blocks(meta, chunk.num_tokens, streamed) * ratio]
        if ahead and streamed.ahead in ([], ahead):
            regions = (streamed.num_regions if streamed.ahead else 0, chunk.num_regions)
            streamed.ahead, streamed.num_regions = ahead, chunk.num_regions
            self._read_some(request_id, meta, len(streamed.pulled), ahead, regions)

    def _num_blocks(self, meta: Any, num_tokens: int, streamed: _StreamedPull) -> int:
        """Of the order, those that so many tokens fill."""
        remote = self.transfer_topo.get_engine_info(meta.remote.engine_id)
        block_size = self._ratio(meta) * remote.remote_block_size
        return max(0, min(int(num_tokens // block_size) - streamed.num_held, len(meta.local_block_ids[0])))

    def _finish_ahead(self, request_id: str, streamed: _StreamedPull, end: int) -> None:
        """Of the blocks that were read ahead, those before `end` of the order are complete."""
        ahead = streamed.ahead[: end - len(streamed.pulled)]
        self._read_some(
            request_id, streamed.meta, len(streamed.pulled), ahead, (streamed.num_regions, self.num_regions)
        )
        streamed.pulled += ahead
        streamed.ahead = streamed.ahead[len(ahead) :]

    def _read_some(
        self, request_id: str, meta: Any, begin: int, there: list[int], regions: tuple[int, int] | None = None
    ) -> None:
        """Reads blocks `there`, which go to those of the order from `begin`, counted in blocks there."""
        ratio = self._ratio(meta)
        here = list(meta.local_block_ids[0][begin // ratio : (begin + len(there)) // ratio])
        is_empty = not here or (regions is not None and regions[0] >= regions[1])
        if is_empty or request_id in self._recv_failures:
            return
        self._part = (*regions, self.num_regions) if regions else _WHOLE
        try:
            super()._read_blocks_for_req(request_id, _between(meta, here, there))
        finally:
            self._part = None

    def _read_blocks(self, **kwargs: Any) -> bool:
        if self._part is None:
            return super()._read_blocks(**kwargs)
        with self.nixl_wrapper.quiet(self._part or None):
            # Past our own, which would expect the check of its lease.
            return bool(NixlPullConnectorWorker._read_blocks(self, **kwargs))

    def _ratio(self, meta: Any) -> int:
        """Blocks there that make one here; 0 if the two engines' blocks don't pair so simply that parts of a request
        can be read."""
        assert self.transfer_topo is not None
        engine_id = meta.remote.engine_id
        remote = self.transfer_topo.get_engine_info(engine_id)
        regions = self.dst_region_group_ids[engine_id]
        is_plain = (
            len(meta.local_block_ids) == 1
            and self._physical_blocks_per_logical_kv_block == remote.remote_physical_blocks_per_logical == 1
            and self.dcp_size == remote.remote_dcp_size == 1
            and not (self._has_mamba or self._is_hma_required)
            and (self.region_group_ids or regions) == regions
            # vLLM tells the ranks that it does not read from that it is done with each of its reads.
            and not (self.use_mla and self.transfer_topo.tp_ratio(remote.remote_tp_size) < 0)
        )
        return int(self.transfer_topo.block_size_ratio(remote.remote_block_size)) if is_plain else 0

    # -- ends --

    def _end(self, request_id: str, streamed: _StreamedPull, state: StreamState) -> None:
        """The prefill engine has made its offer: what is missing is pulled as any other."""
        assert state.end is not None
        meta, params = streamed.meta, state.end
        remote = replace(
            meta.remote,
            block_ids=tuple(map(list, params["remote_block_ids"])),
            request_id=params["remote_request_id"],
            num_tokens=params.get("remote_num_tokens"),
        )
        if not any(meta.local_block_ids):
            self._drop(request_id)
            super()._read_blocks_for_req(request_id, replace(meta, remote=remote))
            return
        if request_id not in self._ahead:
            copies = self._pulled.get(request_id, Copies())
            waited = (now := time.time()) - self._begun.get(request_id, now)
            self._ahead[request_id], self._begun[request_id] = Ahead(copies.kv_bytes, waited), now
            self._pulled[request_id] = replace(copies, seconds=0.0)
        if not self._is_current(request_id, streamed, state):
            return
        offer = Offer.from_param(params.get(OFFER_PARAM))
        if offer is None or offer.prompt != streamed.prompt:
            # As one that has all its KV cache here: the prefill engine hears that it can let its own go.
            super()._read_blocks_for_req(request_id, replace(meta, **_no_blocks(), remote=remote))
            self._give_up(request_id, "its KV cache belongs to another prompt", Stale.OTHER_PROMPT)
            return
        self._read_rest(request_id, streamed, replace(meta, remote=remote, offer=offer))

    def _read_rest(self, request_id: str, streamed: _StreamedPull, meta: Any) -> None:
        """`meta`: the order with the offer in it."""
        ratio = self._ratio(meta)
        rest = meta
        if ratio:
            (local,), (all_there,) = meta.local_block_ids, meta.remote.block_ids
            there = all_there[streamed.num_held * ratio :]
            read = streamed.pulled + streamed.ahead
            same = [a == b for a, b in zip(read, there, strict=False)]
            num_same = same.index(False) if False in same else len(same)
            if num_same < len(read) and self._recving_transfers.get(request_id):
                return  # what is under way must not arrive after what is read in its place
            # The last block always comes now, and whole: with it come the check and the notification.
            num_kept = min(num_same // ratio, len(local) - 1)
            del streamed.pulled[num_kept * ratio :]
            self._finish_ahead(request_id, streamed, num_kept * ratio)
            if request_id in self._recv_failures:
                return
            meta = replace(meta, remote=replace(meta.remote, block_ids=(there,)))
            rest = _between(meta, local[num_kept:], there[num_kept * ratio :])
        self._drop(request_id)
        self._recving_metadata[request_id] = meta
        super()._read_blocks_for_req(request_id, rest)

    def _is_settled(self, request_id: str, failed: set[str]) -> bool:
        is_open = request_id in self._streamed and request_id not in failed | self._recv_failures
        return not is_open and super()._is_settled(request_id, failed)

    def _give_up(self, request_id: str, reason: str | None, stale: Stale = Stale.STREAM_BROKEN) -> None:
        """The request, if it still waits, computes its prompt, once nothing writes to its blocks; `reason` is None if
        it has ended."""
        self._drop(request_id)
        if request_id not in self._recving_metadata:
            return
        if reason is not None:
            logger.warning("request %s computes its prompt, whose KV cache was streamed: %s", request_id, reason)
            self.xfer_stats.record_stale(self.rank, stale)
        self._recv_failures.add(request_id)

    def _drop(self, request_id: str) -> None:
        self._reader.unsubscribe(self._streamed.pop(request_id).name)

    def shutdown(self) -> None:
        if hasattr(self, "_reader"):
            self._reader.close()
            if self._layers is not None:
                self._layers.close()
            if self.side_channel is not None:
                self.side_channel.close()
        super().shutdown()

    # -- prefill engines --

    def _handle_heartbeat(self, payload: str) -> None:
        # A reader knows a streamed request by its lease until the end.
        requests = {lease: request_id for request_id, lease in self._lease_ids.items()}
        super()._handle_heartbeat(",".join(requests.get(name, name) for name in payload.split(",")))


def _between(meta: Any, here: list[int], there: list[int]) -> Any:
    """The order, of these blocks alone."""
    remote = replace(meta.remote, block_ids=(there,))
    return replace(meta, local_block_ids=(here,), local_physical_block_ids=(here,), remote=remote)


def _no_blocks() -> dict[str, Any]:
    return {"local_block_ids": (), "local_physical_block_ids": (), "awaiting_kvs": False}
