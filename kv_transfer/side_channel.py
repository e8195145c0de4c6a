"""Messages between engines beside the KV cache itself: what a prefill engine tells of a request that it still computes,
or is asked to do for a reader.

A `SideChannel` listens, in a thread of its own, on a port that the operating system chooses; where, its engine tells in
the handshake (kv_transfer.identity.HandshakePayload). A `SideChannelClient` is one connection to it. A message is a
kind and a body of plain values, in msgpack. Each connection keeps the order of its messages; one that breaks is not
mended, since what was on its way is lost then: the client finds `is_gone`, the listener forgets the peer at the next
message for it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import zmq
from vllm.logger import init_logger
from vllm.utils.network_utils import make_zmq_path
from zmq.utils.monitor import recv_monitor_message

logger = init_logger(f"vllm.{__name__}")

_HEARTBEAT_MS, _SILENCE_MS = 1000, 5000
"""ZMTP pings on a quiet connection, and after how long without an answer it is given up: a host that vanished closes
none of its connections."""
_CONNECT_MS = 5000
_NEVER_MS = 1 << 30
_MAX_MESSAGE_BYTES = 16 << 20
_MAX_WAITING = 10_000
"""Messages that wait for a peer that reads none; then it is dropped."""
_BROKEN = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_CONNECT_RETRIED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL


class Message(NamedTuple):
    kind: str
    body: Any


Peer = bytes
"""A connection, by the name that the listener's socket gave it; a client that comes again has another."""
Handler = Callable[[Peer, Any], None]
"""Takes who sent a message, and its body; on the channel's thread, which it must not keep."""


def _socket(kind: int) -> Any:
    # The process's context: one of its own would have to be ended, which waits for what others have not taken.
    return zmq.Context.instance().socket(kind)


class SideChannel:
    """The listening end.

    Attributes:
        address: for SideChannelClient.
    """

    def __init__(self, host: str) -> None:
        """`host`: this machine's address, as other engines reach it."""
        self._handlers: dict[str, Handler] = {}
        self._on_gone: list[Callable[[Peer], None]] = []
        self._socket = _socket(zmq.ROUTER)
        _prepare(self._socket, is_ipv6=":" in host)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        port = self._socket.bind_to_random_port(make_zmq_path("tcp", host))
        self.address = make_zmq_path("tcp", host, port)
        self._outbox: deque[tuple[Peer, bytes] | None] = deque()
        # ZMQ's sockets belong to one thread: others put a message out and knock.
        self._knocking = threading.Lock()
        self._knock, self._door = _socket(zmq.PAIR), _socket(zmq.PAIR)
        for end in (self._knock, self._door):
            end.set_hwm(0)  # a handler that sends many messages must not wait for itself
        door = f"inproc://door-{id(self)}"
        self._door.bind(door)
        self._knock.connect(door)
        self._thread = threading.Thread(target=self._serve, name="tknp-kv-side-channel", daemon=True)
        self._thread.start()

    def handle(self, kind: str, handler: Handler) -> None:
        """Has messages of this kind handled. Those of kinds that have no handler are passed over."""
        self._handlers[kind] = handler

    def on_gone(self, listener: Callable[[Peer], None]) -> None:
        """Has it called, on the channel's thread, with each peer that a message could not be sent to."""
        self._on_gone.append(listener)

    def send(self, peer: Peer, kind: str, body: Any) -> None:
        """From any thread; returns at once."""
        self._put((peer, msgspec.msgpack.encode((kind, body))))

    def close(self) -> None:
        """Ends the thread, after what was sent before has been handed to the operating system."""
        if self._thread.is_alive():
            self._put(None)
            self._thread.join()

    def _put(self, item: tuple[Peer, bytes] | None) -> None:
        with self._knocking:
            self._outbox.append(item)
            if not self._knock.closed:
                self._knock.send(b"")

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._door, zmq.POLLIN)
        is_open = True
        while is_open:
            ready = dict(poller.poll())
            if self._door in ready:
                self._door.recv()
                is_open = self._send(self._outbox.popleft())
            if self._socket in ready:
                self._receive(self._socket.recv_multipart())
        with self._knocking:
            self._knock.close()
        self._door.close()
        self._socket.close(linger=_HEARTBEAT_MS)

    def _send(self, item: tuple[Peer, bytes] | None) -> bool:
        if item is None:
            return False
        try:
            self._socket.send_multipart(item, zmq.NOBLOCK)
        except zmq.ZMQError:  # it has gone, or reads nothing
            for listener in self._on_gone:
                self._call(listener, item[0])
        return True

    def _receive(self, frames: list[bytes]) -> None:
        try:
            peer, data = frames
            kind, body = msgspec.msgpack.decode(data)
            handler = self._handlers[kind]
        except (ValueError, TypeError, KeyError, msgspec.DecodeError):
            logger.warning("passed over %d bytes on the KV side channel that are no message", sum(map(len, frames)))
            return
        self._call(handler, peer, body)

    @staticmethod
    def _call(function: Callable[..., None], *args: Any) -> None:
        try:
            function(*args)
        except Exception:  # what one peer sends must not silence the channel for all
            logger.exception("a message on the KV side channel was not handled")


class SideChannelClient:
    """One connection to a SideChannel, for one thread. It is made in the background: what is sent before waits.

    Attributes:
        is_gone: nothing will come any more; as `receive` last saw it.
    """

    def __init__(self, address: str) -> None:
        self.is_gone = False
        self._socket = _socket(zmq.DEALER)
        _prepare(self._socket, is_ipv6="[" in address)
        self._socket.setsockopt(zmq.CONNECT_TIMEOUT, _CONNECT_MS)
        self._socket.setsockopt(zmq.RECONNECT_IVL, _NEVER_MS)  # -1 would drop what has come and was not read yet
        self._monitor = self._socket.get_monitor_socket(_BROKEN)
        self._socket.connect(address)

    def send(self, kind: str, body: Any) -> None:
        try:
            self._socket.send(msgspec.msgpack.encode((kind, body)), zmq.NOBLOCK)
        except zmq.Again:
            self.is_gone = True

    def receive(self, wait_ms: int = 0) -> list[Message]:
        """What has come, in its order; waits so long for the first."""
        messages: list[Message] = []
        # Asked first: what came before the end is still to be had after it.
        is_gone = self.is_gone or self._is_broken()
        if self._socket.poll(wait_ms):
            while self._socket.poll(0):
                messages.append(Message(*msgspec.msgpack.decode(self._socket.recv())))
        self.is_gone = is_gone
        return messages

    def _is_broken(self) -> bool:
        while self._monitor.poll(0):
            if recv_monitor_message(self._monitor)["event"] & _BROKEN:
                return True
        return False

    def close(self) -> None:
        if not self._socket.closed:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._socket.close(linger=_HEARTBEAT_MS)


def _prepare(socket: Any, is_ipv6: bool) -> None:
    socket.setsockopt(zmq.IPV6, int(is_ipv6))
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _SILENCE_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.SNDHWM, _MAX_WAITING)
    socket.setsockopt(zmq.RCVHWM, _MAX_WAITING)
