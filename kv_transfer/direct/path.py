"""The direct way: straight from the GPUs of this host's prefill workers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlHandshakePayload
from vllm.logger import init_logger
from vllm.utils.network_utils import make_zmq_path

from kv_transfer.direct import driver
from kv_transfer.direct.agent import DirectAgent
from kv_transfer.direct.offer import Offer, boot_id, make_offer, read_offer, with_offer
from kv_transfer.direct.pages import Mapping, PageList, UnreachableError
from kv_transfer.direct.transfer import PageCopier
from kv_transfer.direct.watch import watch

logger = init_logger(f"vllm.{__name__}")


class DirectWay:
    """To workers whose memory can be mapped."""

    name = "direct"

    takes_regions = True
    """Whether pages may be given as RegionIds."""

    def __init__(self, nixl: Any, copier: PageCopier) -> None:
        self._copier = copier
        self._kept: Any = None
        self.agent = DirectAgent(nixl, self._copier)

    def offer(self, kv_caches: dict[str, Any], payload: NixlHandshakePayload) -> None:
        """Adds this worker's KV cache to what its peers are told in the handshake."""
        try:
            offer, self._kept = make_offer(list(kv_caches.values()))
            # The first copy compiles the kernel, which no request is to wait for.
            _probe(self._copier, offer.probe_address, offer)
        except Exception as error:  # noqa: BLE001 - whatever it is, there are other ways
            offer = Offer(refusal=f"it can't share its KV cache ({error})")
            logger.warning("KV transfer: decode engines of this host can't pull directly: %s", offer.refusal)
        payload.agent_metadata_bytes = with_offer(payload.agent_metadata_bytes, offer)

    def connect(self, agent: str, host: str, port: int, metadata: bytes) -> str:
        """Looks for the way to a worker; what it is, for the log.

        Args:
            agent: NIXL's name for it.
            host, port: where its engine is shaken hands with.
            metadata: what it said in the handshake.

        Raises:
            UnreachableError, DriverError: there is none.
        """
        offer = read_offer(metadata)
        if offer is None:
            raise UnreachableError("it offers no direct path (a stock NixlConnector does not)")
        self._open(agent, offer)
        address = make_zmq_path("tcp", host, port)

        def let_go() -> None:
            logger.warning("the prefill engine at %s is gone; its KV cache is not mapped any more", address)
            self.agent.disconnect(agent)

        watch(address, lambda: self.agent.is_connected(agent), let_go)
        return f"GPU {offer.gpu} to GPU {driver.gpu_uuid(self._copier.device)}"

    def settle(self, seconds: float) -> None:
        """See DirectAgent.settle."""
        self.agent.settle(seconds)

    def close(self) -> None:
        """Its peers are disconnected by whom they were connected."""

    def _open(self, agent: str, offer: Offer) -> None:
        if offer.refusal:
            raise UnreachableError(offer.refusal)
        if offer.boot_id != boot_id():
            raise UnreachableError("it is on another host")
        mappings: list[Mapping] = []
        with driver.context(self._copier.device):
            try:
                for segment in offer.segments:
                    mappings.append(Mapping(segment.base, segment.size, driver.open_segment(segment)))
                [probe] = PageList([(offer.probe_address, len(offer.probe), 0)]).mapped(mappings).addresses
                _probe(self._copier, int(probe), offer)
                self.agent.connect(agent, mappings)
            except Exception:
                for mapping in mappings:
                    driver.close_segment(mapping.address)
                raise


def _probe(copier: PageCopier, address: int, offer: Offer) -> None:
    """Copies the probe from `address` as KV would be.

    Raises:
        UnreachableError: something else stands there.
    """
    found, first = torch.zeros(len(offer.probe), dtype=torch.uint8).to(copier.device), np.zeros(1, dtype=np.int32)
    source, destination = (PageList([(at, len(offer.probe), 0)]) for at in (address, found.data_ptr()))
    copier.start(source, first, destination, first).wait()
    if bytes(found.cpu().numpy()) != offer.probe:
        raise UnreachableError("a copy of its probe brought other bytes")
