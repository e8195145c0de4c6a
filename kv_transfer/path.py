"""Which way KV takes from a prefill worker: straight from its GPU, packed, or block by block through NIXL. Chosen at
the handshake."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import torch
from vllm import envs
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlHandshakePayload
from vllm.logger import init_logger
from vllm.platforms import current_platform

from kv_transfer import checksums
from kv_transfer.direct.pages import UnreachableError
from kv_transfer.direct.path import DirectWay
from kv_transfer.direct.transfer import PageCopier
from kv_transfer.handshakes import fetch_payload
from kv_transfer.packed.copier import HostCopier
from kv_transfer.packed.messages import Compression
from kv_transfer.packed.path import PackedSettings, PackedWay

logger = init_logger(f"vllm.{__name__}")

SETTING = "kv_transfer_path"
COMPRESSION_SETTING = "kv_transfer_compression"
STAGING_SETTING = "kv_transfer_staging_bytes"
"""Keys in `kv_connector_extra_config`."""

_STAGING_BYTES = 256 << 20


class TransferPath(StrEnum):
    """Values of the setting."""

    AUTO = "auto"  # direct where it works, packed from other hosts, else nixl
    DIRECT = "direct"  # this and the next: or the handshake fails
    PACKED = "packed"
    NIXL = "nixl"


class Way(Protocol):
    """One that is not NIXL's alone.

    Attributes:
        name: of TransferPath.
        agent: stands in the place of NIXL's.
        takes_regions: whether it takes pages as RegionIds.
    """

    name: str
    agent: Any
    takes_regions: bool

    def offer(self, kv_caches: dict[str, Any], payload: NixlHandshakePayload) -> None:
        """Adds what peers need to what they are told in the handshake."""

    def connect(self, agent: str, host: str, port: int, metadata: bytes) -> str:
        """Finds the way to a worker, or raises; something about it for the log."""

    def settle(self, seconds: float) -> None:
        """Waits for what is under way, but not longer than that."""

    def close(self) -> None:
        """Ends what goes on in the background."""


@dataclass(frozen=True)
class PathSettings:
    """What was asked for.

    Attributes:
        path: one of TransferPath.
        compression: one of Compression.
        device: where the KV cache lies; None where neither way below reaches it.
        packed: for the packed way.
    """

    path: str
    compression: str
    device: Any
    packed: PackedSettings


def choose_path(vllm_config: Any, nixl: Any, uses_host_buffer: bool) -> KVPath:
    """The way for this process's worker. Raises ValueError as `make_path`."""
    config = vllm_config.kv_transfer_config
    extra = config.get_from_extra_config
    device = None
    if current_platform.is_cpu():
        device = torch.device("cpu")
    elif current_platform.is_cuda() and not uses_host_buffer:
        device = torch.device("cuda", torch.cuda.current_device())
    settings = PathSettings(
        path=extra(SETTING, TransferPath.AUTO),
        compression=extra(COMPRESSION_SETTING, Compression.NONE),
        device=device,
        packed=PackedSettings(
            host=envs.VLLM_NIXL_SIDE_CHANNEL_HOST,
            serves=config.is_kv_producer,
            reads=config.is_kv_consumer,
            staging_bytes=int(extra(STAGING_SETTING, _STAGING_BYTES)),
            backends=extra("backends", ["UCX"]),
            values_follow=current_platform.is_cpu(),
        ),
    )
    return make_path(settings, nixl)


def make_path(settings: PathSettings, nixl: Any) -> KVPath:
    """The ways that were asked for.

    Raises:
        ValueError: the settings are none, or can't be had on this platform.
    """
    wanted = _member(TransferPath, SETTING, settings.path)
    compression = _member(Compression, COMPRESSION_SETTING, settings.compression)
    if compression is not Compression.NONE:
        if wanted not in (TransferPath.AUTO, TransferPath.PACKED) or settings.device is None:
            raise ValueError(f"{COMPRESSION_SETTING}={compression} needs {SETTING}=packed or auto, not {wanted}")
        if checksums.is_on():
            raise ValueError(f"{checksums.VARIABLE} compares bits, which {COMPRESSION_SETTING}={compression} changes")
    device = settings.device
    if wanted is TransferPath.DIRECT and (device is None or device.type != "cuda"):
        raise ValueError(f"{SETTING}=direct needs KV caches in the memory of CUDA GPUs; leave it at auto")
    if wanted is TransferPath.PACKED and device is None:
        raise ValueError(f"{SETTING}=packed needs KV caches where NIXL reads them; leave kv_buffer_device alone")
    if wanted is TransferPath.NIXL or device is None:
        return KVPath(nixl, [], wanted)
    ways: list[Way] = []
    try:
        copier: Any = PageCopier(device) if device.type == "cuda" else HostCopier()
    except Exception as error:  # whatever it is, NIXL is still there
        if wanted is not TransferPath.AUTO:
            raise ValueError(f"{SETTING}={wanted} can't be had on this GPU: {error}") from error
        logger.warning("KV transfer goes through NIXL, since this GPU can't copy pages itself: %s", error)
        return KVPath(nixl, [], wanted)
    if wanted is not TransferPath.DIRECT:
        ways.append(PackedWay(nixl, copier, settings.packed, compression, wanted is TransferPath.PACKED))
    if wanted is not TransferPath.PACKED and device.type == "cuda":
        ways.insert(0, DirectWay(ways[0].agent if ways else nixl, copier))
    return KVPath(nixl, ways, wanted)


def _member(kind: Any, setting: str, value: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{setting} is one of {', '.join(kind)}, not {value!r}") from None


class KVPath:
    """The ways that may be taken, in the order in which they are tried; NIXL's own is the last."""

    def __init__(self, nixl: Any, ways: list[Way], wanted: TransferPath) -> None:
        self._ways = ways
        self._wanted = wanted
        self.agent = ways[0].agent if ways else nixl
        self.takes_regions = bool(ways) and ways[0].takes_regions

    def offer(self, kv_caches: dict[str, Any], payload: NixlHandshakePayload) -> None:
        """Adds this worker's KV cache to what its peers are told in the handshake."""
        for way in self._ways:
            way.offer(kv_caches, payload)

    def connect(self, host: str, port: int, agents: dict[tuple[int, int], str]) -> None:
        """Looks for a way to the workers of an engine that NIXL has just shaken hands with.

        Args:
            agents: NIXL's names for them, by pipeline and tensor parallel rank.

        Raises:
            UnreachableError: there is none of the kind that was asked for.
        """
        for (pp_rank, tp_rank), agent in agents.items() if self._ways else ():
            where = f"prefill worker {pp_rank}/{tp_rank} at {host}:{port}"
            started = time.perf_counter()
            name, about = self._find(agent, host, port, (pp_rank, tp_rank))
            if name:
                took = (time.perf_counter() - started) * 1e3
                logger.info("KV transfer from %s is %s: %s, found in %.1f ms", where, name, about, took)
            elif self._wanted is not TransferPath.AUTO:
                raise UnreachableError(f"{SETTING}={self._wanted}, but from {where} that can't be had: {about}")
            else:
                logger.info("KV transfer from %s goes through NIXL: %s", where, about)

    def _find(self, agent: str, host: str, port: int, rank: tuple[int, int]) -> tuple[str, str]:
        """The way's name and what is to be said of it; no name if there is none."""
        try:
            metadata = bytes(fetch_payload(host, port, rank).agent_metadata_bytes)
        except Exception as error:  # noqa: BLE001 - whatever it is, NIXL is still there
            return "", f"it did not say what it offers ({error})"
        refusals = []
        for way in self._ways:
            try:
                return way.name, way.connect(agent, host, port, metadata)
            except Exception as error:  # noqa: BLE001 - as above
                refusals.append(f"not {way.name}, since {error}")
        return "", "; ".join(refusals)

    def settle(self, seconds: float) -> None:
        """Waits for what is under way past NIXL, but not longer than that for each way."""
        for way in self._ways:
            way.settle(seconds)

    def close(self) -> None:
        for way in self._ways:
            way.close()
