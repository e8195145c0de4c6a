"""Notices that an engine is gone, by the connection to its side channel.

A process that maps another's GPU memory keeps that memory allocated after the other's death. A prefill engine that is
restarted would find its GPU full, and could not come up to be shaken hands with again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import zmq
from zmq.utils.monitor import recv_monitor_message

_GONE = zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED
_LOOK_MS = 1000


def watch(address: str, is_wanted: Callable[[], bool], on_end: Callable[[], None]) -> threading.Thread:
    """Calls `on_end`, in a thread of its own, once nobody listens at this ZMQ address any more.

    Args:
        is_wanted: asked every second; when it is not, the thread ends.
    """
    thread = threading.Thread(target=_wait, args=(address, is_wanted, on_end), name="tknp-kv-peer-watch", daemon=True)
    thread.start()
    return thread


def _wait(address: str, is_wanted: Callable[[], bool], on_end: Callable[[], None]) -> None:
    is_gone = False
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        with socket.get_monitor_socket(_GONE) as monitor:
            socket.connect(address)
            while not is_gone and is_wanted():
                is_gone = bool(monitor.poll(_LOOK_MS)) and bool(recv_monitor_message(monitor)["event"] & _GONE)
            socket.disable_monitor()
    if is_gone:
        on_end()
