"""What a prefill worker tells of its GPU memory in NIXL's handshake, beside what vLLM tells."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch

from kv_transfer.direct import driver
from kv_transfer.direct.driver import Segment

KEY = "tknp_direct"
"""Stock peers skip what they don't know in this map."""

PROBE_BYTES = 4096


@dataclass(frozen=True)
class Offer:
    """One worker's KV cache for processes of the same host, or why it has none to offer.

    Attributes:
        boot_id: of the host's kernel; containers of a host share it.
        gpu: UUID.
        segments: the allocations in which the KV cache lies.
        probe_address: where `probe` stands in the GPU's memory, within one of them.
    """

    refusal: str = ""
    boot_id: str = ""
    gpu: str = ""
    segments: list[Segment] = field(default_factory=list)
    probe_address: int = 0
    probe: bytes = b""


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def make_offer(tensors: list[Any]) -> tuple[Offer, Any]:
    """Offers the allocations that `tensors`, all on one GPU, lie in.

    Returns:
        The offer, and what must live as long as it.

    Raises:
        DriverError: they can't be shared.
    """
    device = tensors[0].device
    with driver.context(device):
        probe = secrets.token_bytes(PROBE_BYTES)
        pattern = torch.frombuffer(bytearray(probe), dtype=torch.uint8).to(device)
        exported = [driver.export(tensor.data_ptr()) for tensor in (*tensors, pattern)]
        offer = Offer(
            boot_id=boot_id(),
            gpu=driver.gpu_uuid(device),
            segments=list({segment.base: segment for segment in exported}.values()),
            probe_address=pattern.data_ptr(),
            probe=probe,
        )
    return offer, pattern


def with_offer(agent_metadata: bytes, offer: Any, key: str = KEY) -> bytes:
    """vLLM's encoded NixlAgentMetadata, with the offer beside its fields."""
    fields = msgspec.msgpack.decode(agent_metadata)
    return msgspec.msgpack.encode({**fields, key: offer})


class _Extended(msgspec.Struct):
    tknp_direct: Offer | None = None


def read_offer(agent_metadata: bytes) -> Offer | None:
    """None if the peer knows nothing of this path.

    Raises:
        msgspec.MsgspecError: it is not what `with_offer` makes.
    """
    return msgspec.msgpack.decode(agent_metadata, type=_Extended).tknp_direct
