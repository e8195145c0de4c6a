"""What travels between the scheduler's half of the connector and the workers' halves."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.utils import BlockIds
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlConnectorMetadata

from kv_transfer.copies import NO_PATH, Copies, path_of
from kv_transfer.identity import Offer
from kv_transfer.stream_source import Chunk


@dataclass(frozen=True)
class Pull:
    """What a request's pull needs beyond vLLM's ReqMeta.

    Attributes:
        owner: token-parallel rank whose cache the blocks belong to.
        num_readers: how often the offered KV will be read, once for each of the `n` sequences of the client's request;
            the prefill engine frees its blocks after the last.
        offer: what is to be checked when the KV cache has arrived; None if a stock prefill engine offered it.
        trusted_until: of a stock engine's offer, until when its lease is sure to last. Unix seconds, because an order
            may reach a rank late, and ranks may be on several machines.
        stream: under which the prefill engine tells what it has computed (kv_transfer.stream_source), and in the end
            makes its offer; None if it had made it before.
        prompt: of a streamed one, the digest that its offer must have.
    """

    owner: int
    num_readers: int
    offer: Offer | None = None
    trusted_until: float | None = None
    stream: str | None = None
    prompt: str = ""


class TokenParallelConnectorMetadata(NixlConnectorMetadata):
    """One step's orders, the same for all workers of the engine."""

    def __init__(
        self,
        base: NixlConnectorMetadata,
        pulls: dict[str, Pull],
        lease_ids: dict[str, str],
        idle: bool,
        lease_slots: dict[str, int] | None = None,
        lease_blocks: dict[str, BlockIds] | None = None,
        step: int | None = None,
        ended: set[str] | None = None,
        chunks: dict[str, Chunk] | None = None,
        keepers: dict[str, int] | None = None,
    ) -> None:
        """Args:
        base: vLLM's own, whose content is taken over.
        pulls: by request id, for each of `base.reqs_to_recv`.
        lease_ids: the router's names, by request id, for those of `base.reqs_to_send` that have one.
        idle: nothing is computed in this step; it only polls transfers.
        lease_slots: by request id, for each of `base.reqs_to_send`; see kv_transfer.identity.
        lease_blocks: by request id, their blocks by group; only in the test mode of kv_transfer.checksums.
        step: its number, which the workers report when they have computed it; None if nothing is streamed from here.
        ended: requests whose KV cache is streamed to here, and that have ended.
        chunks: what is computed of those that are streamed from here, by stream.
        keepers: token-parallel ranks of `base.reqs_in_batch`, whose KV cache is to be kept for others.
        """
        self.__dict__.update(base.__dict__)
        self.pulls = pulls
        self.lease_ids = lease_ids
        self.idle = idle
        self.lease_slots = lease_slots or {}
        self.lease_blocks = lease_blocks or {}
        self.step = step
        self.ended = ended or set()
        self.chunks = chunks or {}
        self.keepers = keepers or {}


@dataclass(frozen=True)
class Ahead:
    """Of a streamed request, what was before its prefill's end.

    Attributes:
        num_bytes: that had arrived.
        seconds: from the order to pull it.
    """

    num_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class TransferRecord:
    """One request's KV on its way from prefill to the owning rank; times in seconds since the epoch, of the decode
    host. Of a streamed one they begin with the end of its prefill.

    Attributes:
        copy_seconds: of those in between, how long bytes were on their way; see Copies.
        path: see Copies.
        hidden_bytes, prefill_seconds: of a streamed one, see Ahead.
    """

    rank: int
    kv_bytes: int
    num_transfers: int
    transfer_begin: float
    transfer_end: float
    copy_seconds: float = 0.0
    path: str = NO_PATH
    hidden_bytes: int = 0
    prefill_seconds: float = 0.0

    @classmethod
    def of(cls, rank: int, copies: Copies, begun: float, ahead: Ahead) -> TransferRecord:
        """Of a pull that began then, and is complete now."""
        begin_end = begun, time.time()
        counted = rank, copies.kv_bytes, copies.num_copies
        return cls(*counted, *begin_end, copies.seconds, copies.path, ahead.num_bytes, ahead.seconds)

    def merged_with(self, other: TransferRecord) -> TransferRecord:
        """The sum, where a rank's tensor-parallel workers each pull a part or a request has several sequences; these
        may live on several ranks, of which the last is named."""
        return TransferRecord(
            rank=other.rank,
            kv_bytes=self.kv_bytes + other.kv_bytes,
            num_transfers=self.num_transfers + other.num_transfers,
            transfer_begin=min(self.transfer_begin, other.transfer_begin),
            transfer_end=max(self.transfer_end, other.transfer_end),
            copy_seconds=max(self.copy_seconds, other.copy_seconds),
            path=path_of(self.path, other.path),
            hidden_bytes=self.hidden_bytes + other.hidden_bytes,
            prefill_seconds=min(self.prefill_seconds, other.prefill_seconds),
        )


@dataclass
class TransferReport(KVConnectorWorkerMetadata):
    """The pulls that ended in a step, by request id, and the number of the step if it is wanted."""

    records: dict[str, TransferRecord] = field(default_factory=dict)
    step: int | None = None

    def aggregate(self, other: Any) -> TransferReport:
        merged = dict(self.records)
        for request_id, record in other.records.items():
            known = merged.get(request_id)
            merged[request_id] = record if known is None else known.merged_with(record)
        return TransferReport(merged, self.step if other.step is None else other.step)  # the same of all
