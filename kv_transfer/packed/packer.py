"""The prefill worker's side of packing: copies blocks of its KV cache into slots, for readers that ask."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import msgspec
import numpy as np
from vllm.logger import init_logger

from kv_transfer.direct.ids import Ids
from kv_transfer.direct.pages import Mapping, PageList
from kv_transfer.packed import ORDER_SECONDS, SLOT_SECONDS
from kv_transfer.packed.copier import Copier
from kv_transfer.packed.fp8 import HeadShape
from kv_transfer.packed.messages import (
    FREE,
    NUDGE,
    OPEN,
    OPENED,
    PACK,
    PACKED,
    Compression,
    Free,
    Open,
    Opened,
    Pack,
    Packed,
    from_runs,
)
from kv_transfer.packed.staging import Staging
from kv_transfer.packed.wire import Compressed, Plain, Slot, Wire
from kv_transfer.side_channel import Peer, SideChannel

logger = init_logger(f"vllm.{__name__}")

_NUDGE_SECONDS = 1.0


@dataclass
class _Reader:
    pages: PageList
    wire: Wire


@dataclass
class _Order:
    ids: Ids
    arrived: float
    slot: Slot | None = None


class Packer:
    """One thread that does all that is asked for, in its order; the staging buffer is made when first needed.

    Attributes:
        address: where it is asked, for SideChannelClient.
    """

    def __init__(
        self, host: str, copier: Copier, mappings: list[Mapping], head_shape: Callable[[], HeadShape], staging: Any
    ) -> None:
        """Args:
        host: this machine's address.
        mappings: the memory that may be asked for.
        head_shape: raises UnfitError.
        staging: makes it.
        """
        self._copier = copier
        self._mappings = mappings
        self._head_shape = head_shape
        self._make_staging: Callable[[], Staging] = staging
        self._staging: Staging | None = None
        self._free: deque[Slot] = deque()
        self._readers: dict[Peer, _Reader] = {}
        self._orders: dict[tuple[Peer, int], _Order] = {}  # the oldest first
        self._nudge_at = 0.0
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="tknp-kv-pack", daemon=True)
        self._channel = SideChannel(host)
        self.address = self._channel.address
        for kind, handler in ((OPEN, self._open), (PACK, self._order), (FREE, self._drop)):
            self._channel.handle(kind, self._later(handler))
        self._channel.on_gone(self._later(self._forget))
        self._thread.start()

    def close(self) -> None:
        self._channel.close()
        self._todo.put(None)
        self._thread.join()
        if self._staging is not None:
            self._staging.close()

    def _later(self, method: Callable[..., None]) -> Callable[..., None]:
        return lambda *args: self._todo.put(lambda: method(*args))

    def _run(self) -> None:
        while True:
            try:
                if (work := self._todo.get(timeout=_NUDGE_SECONDS)) is None:
                    return
                work()
            except queue.Empty:
                pass
            except Exception:  # what one reader asks must not end the service of all
                logger.exception("an order to pack KV cache was not understood")
            self._reclaim()
            self._pack_waiting()

    def _open(self, peer: Peer, body: Any) -> None:
        try:
            opened = self._opened(peer, msgspec.convert(body, Open))
        except Exception as error:  # noqa: BLE001 - memory, NIXL's, or an unfit cache: the reader says it and goes on
            opened = Opened(refusal=str(error))
        self._channel.send(peer, OPENED, opened)

    def _opened(self, peer: Peer, wanted: Open) -> Opened:
        pages = from_runs(wanted.runs).mapped(self._mappings)
        wire: Wire = Plain(self._copier)
        shape = None
        if wanted.compression is Compression.FP8:
            shape = self._head_shape()
            shape.check(pages.lengths)
            wire = Compressed(self._copier, shape)
        if self._copier.device.type == "cuda":
            pages.check_alignment()
        if self._staging is None:
            self._staging = self._make_staging()
            self._free.extend(self._staging.slots)
        self._readers[peer] = _Reader(pages, wire)
        return Opened(
            agent=self._staging.agent.get_agent_metadata(),
            whole=astuple(self._staging.whole),
            slot_bytes=self._staging.slot_bytes,
            probe=self._staging.probe,
            head_shape=None if shape is None else astuple(shape),
        )

    def _order(self, peer: Peer, body: Any) -> None:
        asked = msgspec.convert(body, Pack)
        ids = np.frombuffer(asked.ids, dtype=np.int32)
        self._orders[peer, asked.order] = _Order(ids, time.monotonic())

    def _drop(self, peer: Peer, body: Any) -> None:
        self._end(peer, msgspec.convert(body, Free).order)

    def _forget(self, peer: Peer) -> None:
        self._readers.pop(peer, None)
        for owner, number in [key for key in self._orders if key[0] == peer]:
            self._end(owner, number)

    def _end(self, peer: Peer, number: int) -> None:
        order = self._orders.pop((peer, number), None)
        if order is not None and order.slot is not None:
            self._free.append(order.slot)

    def _reclaim(self) -> None:
        now = time.monotonic()
        for (peer, number), order in list(self._orders.items()):
            if now > order.arrived + (ORDER_SECONDS if order.slot is None else SLOT_SECONDS):
                logger.warning("a slot of packed KV cache was not freed by its reader in %.0f s", now - order.arrived)
                self._end(peer, number)
        if now > self._nudge_at:
            self._nudge_at = now + _NUDGE_SECONDS
            for peer in self._readers:
                self._channel.send(peer, NUDGE, None)

    def _pack_waiting(self) -> None:
        for (peer, number), order in list(self._orders.items()):
            if order.slot is not None:
                continue
            if not self._free:
                return
            order.slot = self._free.popleft()
            try:
                self._pack(peer, order, order.slot)
            except Exception as error:  # noqa: BLE001 - a reader's mistake, or CUDA's: the reader is told
                self._end(peer, number)
                self._channel.send(peer, PACKED, Packed(number, refusal=f"{type(error).__name__}: {error}"))
            else:
                self._channel.send(peer, PACKED, Packed(number, order.slot.index))

    def _pack(self, peer: Peer, order: _Order, slot: Slot) -> None:
        reader = self._readers[peer]
        if order.ids.min() < 0 or int(reader.wire.sizes(reader.pages.lengths[order.ids]).sum()) > slot.data.numel():
            raise ValueError(f"{len(order.ids)} pages are not in the list, or do not fit into a slot")
        reader.wire.pack(reader.pages, order.ids, slot).wait()
