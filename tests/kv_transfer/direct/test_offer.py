from __future__ import annotations

import msgspec
import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlAgentMetadata

from kv_transfer.direct.driver import Segment
from kv_transfer.direct.offer import KEY, Offer, read_offer, with_offer

STOCK = NixlAgentMetadata("engine", b"agent", [1 << 46], 0, 1, [1], [1], "LBHNC", 16, (0, 0), "FLASH_ATTN", 1)
OFFER = Offer("", "boot", "GPU-1", [Segment(1 << 46, 1 << 34, bytes(range(64)))], (1 << 46) + 512, b"probe")


def test_an_offer_travels_beside_what_stock_peers_read() -> None:
    told = with_offer(msgspec.msgpack.encode(STOCK), OFFER)
    assert read_offer(told) == OFFER
    assert msgspec.msgpack.Decoder(NixlAgentMetadata).decode(told) == STOCK


def test_a_stock_peer_offers_nothing() -> None:
    assert read_offer(msgspec.msgpack.encode(STOCK)) is None


def test_nonsense_is_an_error() -> None:
    with pytest.raises(msgspec.ValidationError):
        read_offer(msgspec.msgpack.encode({KEY: {"segments": 7}}))
