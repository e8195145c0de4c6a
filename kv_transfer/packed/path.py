"""The packed way: from workers of other hosts, or from all where that is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlHandshakePayload
from vllm.utils.network_utils import make_zmq_path

from kv_transfer.direct.offer import boot_id, with_offer
from kv_transfer.direct.pages import Mapping, UnreachableError
from kv_transfer.packed import NUM_SLOTS
from kv_transfer.packed.agent import PackedAgent
from kv_transfer.packed.copier import Copier
from kv_transfer.packed.fp8 import HeadShape
from kv_transfer.packed.messages import Compression
from kv_transfer.packed.packer import Packer
from kv_transfer.packed.puller import Puller
from kv_transfer.packed.staging import Staging

KEY = "tknp_packed"
"""Stock peers skip what they don't know in the handshake's map."""


@dataclass(frozen=True)
class PackedSettings:
    """Of a worker.

    Attributes:
        host: this machine's address, as other engines reach it.
        serves, reads: whether it packs for others, and whether it reads from them.
        staging_bytes: of the staging buffer, which is made when first needed.
        backends: NIXL's.
        values_follow: see HeadShape.of.
    """

    host: str
    serves: bool
    reads: bool
    staging_bytes: int
    backends: list[str]
    values_follow: bool


class Offer(msgspec.Struct):
    """What a prefill worker tells: its side channel's port, and the boot id of its host."""

    port: int
    boot_id: str


class _Extended(msgspec.Struct):
    tknp_packed: Offer | None = None


class PackedWay:
    """See the module."""

    name = "packed"
    takes_regions = False

    def __init__(
        self, nixl: Any, copier: Copier, settings: PackedSettings, compression: Compression, is_forced: bool
    ) -> None:
        """Args:
        is_forced: from workers of this host, too.
        """
        self._copier = copier
        self._settings = settings
        self._compression = compression
        self._is_forced = is_forced
        self._packer: Packer | None = None
        self._puller = Puller(copier, self._make_staging, compression) if settings.reads else None
        self.agent: Any = nixl if self._puller is None else PackedAgent(nixl, self._puller)

    def _make_staging(self) -> Staging:
        return Staging(self._copier.device, self._settings.staging_bytes, self._settings.backends)

    def offer(self, kv_caches: dict[str, Any], payload: NixlHandshakePayload) -> None:
        """Begins to listen, and adds where to what peers are told in the handshake.

        Raises:
            UnfitError: compression was asked for, but this KV cache can't be compressed.
        """
        caches = list(kv_caches.values())
        if self._compression is not Compression.NONE:
            HeadShape.of(caches, self._settings.values_follow)
        if not self._settings.serves:
            return
        storages = {cache.untyped_storage().data_ptr(): cache.untyped_storage().nbytes() for cache in caches}
        self._packer = Packer(
            self._settings.host,
            self._copier,
            [Mapping(address, size, address) for address, size in storages.items()],
            lambda: HeadShape.of(caches, self._settings.values_follow),
            self._make_staging,
        )
        offer = Offer(int(self._packer.address.rpartition(":")[2]), boot_id())
        payload.agent_metadata_bytes = with_offer(payload.agent_metadata_bytes, offer, KEY)

    def connect(self, agent: str, host: str, port: int, metadata: bytes) -> str:
        """As DirectWay.connect.

        Raises:
            UnreachableError: there is no such way, or none is wanted.
        """
        offer = msgspec.msgpack.decode(metadata, type=_Extended).tknp_packed
        if offer is None:
            raise UnreachableError("it offers no packing (a stock NixlConnector does not)")
        if not self._is_forced and offer.boot_id == boot_id():
            raise UnreachableError("it is on this host")
        self.agent.connect(agent, make_zmq_path("tcp", host, offer.port))
        slot_mib = self._settings.staging_bytes / NUM_SLOTS / (1 << 20)
        return f"up to {slot_mib:g} MiB at a time, compression {self._compression}"

    def settle(self, seconds: float) -> None:
        """See PackedAgent.settle."""
        if self._puller is not None:
            self.agent.settle(seconds)

    def close(self) -> None:
        for one in (self._puller, self._packer):
            if one is not None:
                one.close()
