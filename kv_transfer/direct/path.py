"""Which way KV takes from a prefill worker: straight from its GPU, or through NIXL. Chosen at the handshake."""

from __future__ import annotations

import time
from enum import StrEnum
from typing import Any

import msgspec
import numpy as np
import torch
import zmq
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import GET_META_MSG, NixlHandshakePayload
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.utils import zmq_ctx
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.network_utils import make_zmq_path

from kv_transfer.direct import driver
from kv_transfer.direct.agent import DirectAgent
from kv_transfer.direct.offer import Offer, boot_id, make_offer, read_offer, with_offer
from kv_transfer.direct.pages import Mapping, PageList, UnreachableError
from kv_transfer.direct.transfer import PageCopier
from kv_transfer.direct.watch import watch

logger = init_logger(f"vllm.{__name__}")

SETTING = "kv_transfer_path"
"""Key in `kv_connector_extra_config`."""

_HANDSHAKE_SECONDS = 1.0


class TransferPath(StrEnum):
    """Values of the setting."""

    AUTO = "auto"  # direct where it works
    DIRECT = "direct"  # or the handshake fails
    NIXL = "nixl"


def choose_path(vllm_config: Any, nixl: Any, uses_host_buffer: bool) -> DirectPath | NixlPath:
    """The way for this process's worker. Raises ValueError as `make_path`."""
    setting = vllm_config.kv_transfer_config.get_from_extra_config(SETTING, TransferPath.AUTO)
    is_on_gpu = current_platform.is_cuda() and not uses_host_buffer
    return make_path(setting, nixl, torch.device("cuda", torch.cuda.current_device()) if is_on_gpu else None)


def make_path(setting: str, nixl: Any, device: Any) -> DirectPath | NixlPath:
    """The way for a worker whose KV cache lies on this CUDA device; None where there is no such.

    Raises:
        ValueError: the setting is none, or can't be had on this platform.
    """
    try:
        wanted = TransferPath(setting)
    except ValueError:
        raise ValueError(f"{SETTING} is auto, direct or nixl, not {setting!r}") from None
    if wanted is TransferPath.NIXL or device is None:
        if wanted is TransferPath.DIRECT:
            raise ValueError(f"{SETTING}=direct needs KV caches in the memory of CUDA GPUs; leave it at auto")
        return NixlPath(nixl)
    try:
        return DirectPath(nixl, PageCopier(device), wanted is TransferPath.DIRECT)
    except Exception as error:  # as below
        if wanted is TransferPath.DIRECT:
            raise ValueError(f"{SETTING}=direct can't be had on this GPU: {error}") from error
        logger.warning("KV transfer goes through NIXL, since this GPU can't copy pages itself: %s", error)
        return NixlPath(nixl)


class NixlPath:
    """Everything goes through NIXL."""

    takes_regions = False

    def __init__(self, nixl: Any) -> None:
        self.agent = nixl

    def offer(self, kv_caches: dict[str, Any], payload: Any) -> None:
        """Nothing to offer."""

    def connect(self, host: str, port: int, agents: dict[tuple[int, int], str]) -> None:
        """Nothing to connect."""

    def settle(self, seconds: float) -> None:
        """NIXL's reads are not waited for."""


class DirectPath:
    """Straight from peers on this host whose memory can be mapped; through NIXL from all others."""

    takes_regions = True
    """Whether pages may be given as RegionIds."""

    def __init__(self, nixl: Any, copier: PageCopier, required: bool) -> None:
        """Args:
        required: a peer that can't be reached directly is no peer.
        """
        self._copier = copier
        self._required = required
        self._kept: Any = None
        self.agent = DirectAgent(nixl, self._copier)

    def offer(self, kv_caches: dict[str, Any], payload: NixlHandshakePayload) -> None:
        """Adds this worker's KV cache to what its peers are told in the handshake."""
        try:
            offer, self._kept = make_offer(list(kv_caches.values()))
            # The first copy compiles the kernel, which no request is to wait for.
            _probe(self._copier, offer.probe_address, offer)
        except Exception as error:  # noqa: BLE001 - whatever it is, NIXL is still there
            offer = Offer(refusal=f"it can't share its KV cache ({error})")
            logger.warning("KV transfer: decode engines of this host pull through NIXL: %s", offer.refusal)
        payload.agent_metadata_bytes = with_offer(payload.agent_metadata_bytes, offer)

    def connect(self, host: str, port: int, agents: dict[tuple[int, int], str]) -> None:
        """Looks for the direct way to the workers of an engine that NIXL has just shaken hands with.

        Args:
            agents: NIXL's names for them, by pipeline and tensor parallel rank.

        Raises:
            UnreachableError: there is none, and it was asked for.
        """
        for (pp_rank, tp_rank), agent in agents.items():
            started = time.perf_counter()
            try:
                offer = _fetch_offer(host, port, pp_rank, tp_rank)
                self._open(agent, offer)
            except Exception as error:  # as above
                where = f"prefill worker {pp_rank}/{tp_rank} at {host}:{port}"
                if self._required:
                    raise UnreachableError(f"{SETTING}=direct, but there is none to {where}: {error}") from error
                logger.warning("KV transfer from %s goes through NIXL: %s", where, error)
                continue
            logger.info(
                "KV transfer from prefill worker %d/%d at %s:%d is direct: GPU %s to GPU %s, found in %.1f ms",
                *(pp_rank, tp_rank, host, port, offer.gpu, driver.gpu_uuid(self._copier.device)),
                (time.perf_counter() - started) * 1e3,
            )
        self._watch(make_zmq_path("tcp", host, port), list(agents.values()))

    def _watch(self, address: str, agents: list[str]) -> None:
        def let_go() -> None:
            logger.warning("the prefill engine at %s is gone; its KV cache is not mapped any more", address)
            for agent in agents:
                self.agent.disconnect(agent)

        if any(map(self.agent.is_connected, agents)):
            watch(address, lambda: any(map(self.agent.is_connected, agents)), let_go)

    def settle(self, seconds: float) -> None:
        """See DirectAgent.settle."""
        self.agent.settle(seconds)

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


def _fetch_offer(host: str, port: int, pp_rank: int, tp_rank: int) -> Offer:
    """Asks again what vLLM's handshake asked, whose decoder drops what it does not know."""
    with zmq_ctx(zmq.REQ, make_zmq_path("tcp", host, port)) as socket:
        socket.setsockopt(zmq.RCVTIMEO, int(_HANDSHAKE_SECONDS * 1e3))
        socket.send(msgspec.msgpack.encode((GET_META_MSG, pp_rank, tp_rank)))
        reply = socket.recv_multipart()
    payload = msgspec.msgpack.decode(reply[0], type=NixlHandshakePayload)
    offer = read_offer(payload.agent_metadata_bytes)
    if offer is None:
        raise UnreachableError("it offers no direct path (a stock NixlConnector does not)")
    return offer


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
