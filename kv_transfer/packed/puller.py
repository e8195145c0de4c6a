"""The decode rank's side of packing: orders slotfuls of pages, reads them, and spreads them over its blocks."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec
from vllm.logger import init_logger

from kv_transfer.direct.pages import PageList, UnreachableError
from kv_transfer.packed import NUM_SLOTS, ORDER_SECONDS
from kv_transfer.packed.copier import Copier, Work
from kv_transfer.packed.fp8 import HeadShape
from kv_transfer.packed.messages import (
    FREE,
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
    to_runs,
)
from kv_transfer.packed.read import PackedRead, PeerLostError
from kv_transfer.packed.staging import Piece, Staging
from kv_transfer.packed.wire import Compressed, Plain, Slot, Wire, slotfuls
from kv_transfer.side_channel import SideChannelClient

logger = init_logger(f"vllm.{__name__}")

_ORDERS_PER_PEER = NUM_SLOTS // 2
"""At a time, so that a worker that does not answer leaves slots to the others."""
_OPEN_SECONDS = 5.0
_IDLE_SECONDS = 1.0
_POLL_SECONDS = {"cuda": 5e-5, "cpu": 5e-4}


@dataclass
class _Peer:
    """A prefill worker, by NIXL's name of its agent for vLLM.

    Attributes:
        agent: name of its agent for staging; empty until it has opened.
        whole, stride: its staging buffer, and the bytes from slot to slot.
        slot_bytes: that fit into a slot on both sides.
        waiting: what is still to be ordered, each with a part of its read's pages.
    """

    name: str
    client: SideChannelClient
    pages: PageList
    opening: Future[None]
    deadline: float
    agent: str = ""
    whole: Piece = field(default_factory=lambda: Piece(0, 0, 0, ""))
    stride: int = 0
    slot_bytes: int = 0
    wire: Wire | None = None
    waiting: deque[tuple[PackedRead, slice]] = field(default_factory=deque)
    orders: dict[int, _Order] = field(default_factory=dict)


@dataclass
class _Order:
    """A slotful under way.

    Attributes:
        slot: where it will stand here.
        handle: NIXL's, while it is read.
        work: that takes it out of the slot.
    """

    read: PackedRead
    part: slice
    slot: Slot
    deadline: float
    num_bytes: int
    handle: Any = None
    work: Work | None = None


class Puller:
    """One thread that has the connections, the staging buffer and all that is under way."""

    def __init__(self, copier: Copier, staging: Callable[[], Staging], compression: Compression) -> None:
        """Args:
        staging: makes it; called when the first peer is connected.
        """
        self._copier = copier
        self._make_staging = staging
        self._compression = compression
        self._staging: Staging | None = None
        self._free: deque[Slot] = deque()
        self._peers: dict[str, _Peer] = {}
        self._num_orders = 0
        self._stuck: list[tuple[Any, Slot]] = []  # reads that NIXL could not end: they may still write
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="tknp-kv-unpack", daemon=True)
        self._thread.start()

    # -- for all threads --

    def connect(self, name: str, address: str, pages: PageList) -> None:
        """Opens the way to a prefill worker.

        Args:
            address: of its side channel.
            pages: of its KV cache, which reads will name by their numbers.

        Raises:
            UnreachableError: there is none.
        """
        opening: Future[None] = Future()
        self._todo.put(lambda: self._connect(name, address, pages, opening))
        try:
            opening.result(2 * _OPEN_SECONDS)
        except TimeoutError:
            raise UnreachableError("this engine was too busy to open it") from None

    def disconnect(self, name: str) -> None:
        self._todo.put(lambda: self._lose(name, "it was disconnected"))

    def is_connected(self, name: str) -> bool:
        peer = self._peers.get(name)
        return peer is not None and bool(peer.agent)

    def start(self, read: PackedRead) -> None:
        self._todo.put(lambda: self._start(read))

    def close(self) -> None:
        self._todo.put(None)
        self._thread.join()

    # -- the thread --

    def _run(self) -> None:
        while self._take_orders():
            try:
                for peer in list(self._peers.values()):
                    self._listen(peer)
                    self._follow(peer)
                self._order()
                self._retry_stuck()
            except Exception as error:  # nobody may wait for what this thread has lost track of
                logger.exception("packed KV transfer begins anew")
                self._lose_all(f"{type(error).__name__}: {error}")
        self._lose_all("this engine ends")
        if self._staging is not None and not self._stuck:
            self._staging.close()

    def _take_orders(self) -> bool:
        is_busy = any(p.waiting or p.orders or not p.opening.done() for p in self._peers.values())
        with suppress(queue.Empty):
            wait = _POLL_SECONDS[self._copier.device.type] if is_busy else _IDLE_SECONDS
            work = self._todo.get(timeout=wait)
            while work is not None:
                work()
                work = self._todo.get_nowait()
            return False
        return True

    def _connect(self, name: str, address: str, pages: PageList, opening: Future[None]) -> None:
        self._lose(name, "it is connected again")
        try:
            if self._staging is None:
                self._staging = self._make_staging()
                self._free.extend(self._staging.slots)
            client = SideChannelClient(address)
            client.send(OPEN, Open(to_runs(pages), self._compression))
        except Exception as error:  # noqa: BLE001 - memory, or NIXL's
            opening.set_exception(UnreachableError(f"no staging buffer here: {error}"))
            return
        self._peers[name] = _Peer(name, client, pages, opening, time.monotonic() + _OPEN_SECONDS)

    def _opened(self, peer: _Peer, opened: Opened) -> None:
        if opened.refusal:
            raise UnreachableError(opened.refusal)
        assert self._staging is not None
        peer.stride = opened.slot_bytes
        peer.slot_bytes = min(opened.slot_bytes, self._staging.slot_bytes)
        peer.wire = Plain(self._copier)
        if opened.head_shape is not None:
            peer.wire = Compressed(self._copier, HeadShape(*opened.head_shape))
        if (largest := int(peer.wire.sizes(peer.pages.lengths).max())) > peer.slot_bytes:
            raise UnreachableError(f"a slot of {peer.slot_bytes} bytes holds no page, which takes {largest}")
        peer.whole = Piece(*opened.whole)
        agent = self._staging.agent.add_remote_agent(opened.agent)
        self._staging.check_probe(agent, peer.whole, opened.probe)
        peer.agent = agent

    def _start(self, read: PackedRead) -> None:
        peer = self._peers.get(read.peer)
        if peer is None or peer.wire is None:
            read.fail(PeerLostError(f"the prefill worker {read.peer} is gone"))
            return
        try:
            sizes = peer.wire.sizes(peer.pages.lengths[read.source_ids])
        except IndexError as error:
            read.fail(error)
            return
        parts = list(slotfuls(sizes, peer.slot_bytes))
        read.begin(len(parts), int(sizes.sum()))
        peer.waiting.extend((read, part) for part in parts)

    def _order(self) -> None:
        is_any = True
        while is_any and self._free:
            is_any = False
            for peer in self._peers.values():
                if self._free and len(peer.orders) < _ORDERS_PER_PEER and peer.waiting:
                    is_any = True
                    self._order_part(peer, *peer.waiting.popleft())

    def _order_part(self, peer: _Peer, read: PackedRead, part: slice) -> None:
        if read.is_over:
            return
        assert peer.wire is not None
        self._num_orders += 1
        ids = read.source_ids[part]
        num_bytes = int(peer.wire.sizes(peer.pages.lengths[ids]).sum())
        deadline = time.monotonic() + ORDER_SECONDS
        peer.orders[self._num_orders] = _Order(read, part, self._free.popleft(), deadline, num_bytes)
        peer.client.send(PACK, Pack(self._num_orders, ids.tobytes()))

    def _listen(self, peer: _Peer) -> None:
        for kind, body in peer.client.receive():
            try:
                if kind == OPENED:
                    self._opened(peer, msgspec.convert(body, Opened))
                    peer.opening.set_result(None)
                elif kind == PACKED:
                    self._packed(peer, msgspec.convert(body, Packed))
            except Exception as error:  # noqa: BLE001 - NIXL's have no common class; all mean that it can't be read
                self._lose(peer.name, f"{error}")
                return
        if peer.client.is_gone:
            self._lose(peer.name, "nobody answers at its side channel")
        elif not peer.opening.done() and time.monotonic() > peer.deadline:
            self._lose(peer.name, f"it did not answer within {_OPEN_SECONDS:.0f} s")

    def _packed(self, peer: _Peer, packed: Packed) -> None:
        order = peer.orders.get(packed.order)
        if order is None:
            return  # it was given up
        if packed.refusal:
            order.read.fail(RuntimeError(f"the prefill worker could not pack: {packed.refusal}"))
        if order.read.is_over:
            self._end(peer, packed.order)
            return
        assert self._staging is not None
        source = peer.whole.part(packed.slot * peer.stride, order.num_bytes)
        order.handle = self._staging.read(peer.agent, source, self._staging.slot_piece(order.slot, order.num_bytes))

    def _follow(self, peer: _Peer) -> None:
        assert self._staging is not None or not peer.orders
        for number, order in list(peer.orders.items()):
            try:
                if order.work is not None:
                    if order.work.is_done():
                        order.read.finish_part()
                        del peer.orders[number]
                        self._free.append(order.slot)
                elif time.monotonic() > order.deadline:  # the slot there may be another's by now
                    order.read.fail(TimeoutError(f"a slotful did not arrive within {ORDER_SECONDS:.0f} s"))
                    self._end(peer, number)
                elif order.handle is not None:
                    self._poll_read(peer, number, order)
            except Exception as error:  # noqa: BLE001 - as above
                order.read.fail(error)
                self._end(peer, number)

    def _poll_read(self, peer: _Peer, number: int, order: _Order) -> None:
        assert self._staging is not None and peer.wire is not None
        state = self._staging.agent.check_xfer_state(order.handle)
        if state == "PROC":
            return
        if state != "DONE":
            raise RuntimeError(f"NIXL says {state} of a packed read")
        handle, order.handle = order.handle, None
        self._staging.agent.release_xfer_handle(handle)
        peer.client.send(FREE, Free(number))
        with order.read.unpacking() as is_wanted:
            if is_wanted:
                read, part = order.read, order.part
                order.work = peer.wire.unpack(order.slot, read.destinations, read.destination_ids[part])
                read.works.append(order.work)
        if order.work is None:
            del peer.orders[number]
            self._free.append(order.slot)

    def _end(self, peer: _Peer, number: int) -> None:
        """Gives an order up."""
        order = peer.orders.pop(number)
        peer.client.send(FREE, Free(number))
        if order.work is not None:
            order.work.wait()
        if order.handle is None or self._is_released(order.handle):
            self._free.append(order.slot)
        else:
            self._stuck.append((order.handle, order.slot))

    def _is_released(self, handle: Any) -> bool:
        assert self._staging is not None
        try:
            self._staging.agent.release_xfer_handle(handle)
        except Exception:  # noqa: BLE001 - as above; it is tried again
            return False
        return True

    def _retry_stuck(self) -> None:
        for handle, slot in list(self._stuck):
            if self._is_released(handle):
                self._stuck.remove((handle, slot))
                self._free.append(slot)

    def _lose_all(self, reason: str) -> None:
        for name in list(self._peers):
            self._lose(name, reason)

    def _lose(self, name: str, reason: str) -> None:
        peer = self._peers.pop(name, None)
        if peer is None:
            return
        if not peer.opening.done():
            peer.opening.set_exception(UnreachableError(reason))
        error = PeerLostError(f"the prefill worker {name} is gone: {reason}")
        for read in _reads_of(peer):
            read.fail(error)
        for number in list(peer.orders):
            self._end(peer, number)
        # ZMQ's end of a connection may wait; other peers must not.
        threading.Thread(target=peer.client.close, name="tknp-kv-hang-up", daemon=True).start()
        if peer.agent and self._staging is not None:
            with suppress(Exception):  # NIXL's, of one that died
                self._staging.agent.remove_remote_agent(peer.agent)


def _reads_of(peer: _Peer) -> Iterator[PackedRead]:
    for read, _ in peer.waiting:
        yield read
    for order in peer.orders.values():
        yield order.read
