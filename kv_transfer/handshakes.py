"""First contact with prefill engines, such that one that does not answer delays no other, and one that is slow is asked
again.

vLLM makes handshakes one after the other in a single thread, each of which may wait five seconds for an answer and is
then given up. Here each engine has a thread of its own that waits until it answers; only then comes vLLM's handshake,
still one at a time, since NIXL is not sure to be thread-safe."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import msgspec
import zmq
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import GET_META_MSG
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.utils import zmq_ctx
from vllm.logger import init_logger
from vllm.utils.network_utils import make_zmq_path

from kv_transfer.identity import HandshakePayload

logger = init_logger(f"vllm.{__name__}")

_MAX_AT_ONCE = 64
_FIRST_PATIENCE, _LONGEST_PATIENCE = 0.25, 2.0
"""Seconds for the first answer; doubled with each try."""


WarmUp = Callable[[str, int, tuple[int, int], str], None]
"""Takes an engine's host and port, and the ranks and the agent of one of its workers."""


class HandshakeExecutor(Executor):
    """Runs vLLM's handshakes: `submit(handshake, host, port, ...)`."""

    def __init__(self, give_up_after: float, on_retry: Callable[[], None], warm_up: WarmUp) -> None:
        """Args:
        give_up_after: seconds; then the requests that wait for it compute their prompts.
        on_retry: called when an engine is asked again.
        warm_up: called for each of an engine's workers when the handshake is done.
        """
        self._give_up_after = give_up_after
        self._on_retry = on_retry
        self._warm_up = warm_up
        self._pool = ThreadPoolExecutor(_MAX_AT_ONCE, thread_name_prefix="tknp-kv-handshake")
        self._nixl = threading.Lock()
        self._is_shut_down = threading.Event()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self._pool.submit(self._handshake, fn, args, kwargs)

    def _handshake(self, handshake: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        host, port, _, engine_id = args[:4]
        deadline = time.monotonic() + self._give_up_after
        patience = _FIRST_PATIENCE
        while not _answers(host, port, patience):
            if time.monotonic() > deadline or self._is_shut_down.is_set():
                raise TimeoutError(
                    f"prefill engine {engine_id} did not answer at {host}:{port} within {self._give_up_after:.0f} s; "
                    "is it running, and can this machine reach that port?"
                )
            patience = min(2 * patience, _LONGEST_PATIENCE)
            self._on_retry()
        with self._nixl:
            made = handshake(*args, **kwargs)
            agents, _ = made
            for worker, agent_name in agents.items():
                self._warm_up(host, port, worker, agent_name)
        return made

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._is_shut_down.set()
        self._pool.shutdown(wait=wait, cancel_futures=True)


def _answers(host: str, port: int, patience: float) -> bool:
    """Whether the engine's side channel (base_scheduler.py, _nixl_handshake_listener) answers within `patience`
    seconds."""
    context: Any = zmq.Context.instance()
    with context.socket(zmq.REQ) as sock:
        sock.setsockopt(zmq.LINGER, 0)
        sock.connect(make_zmq_path("tcp", host, port))
        sock.send(msgspec.msgpack.encode((GET_META_MSG, 0, 0)))
        return bool(sock.poll(int(patience * 1000)))


def fetch_payload(host: str, port: int, worker: tuple[int, int]) -> HandshakePayload:
    """Asks again what vLLM's handshake asked, whose decoder drops what it does not know; a stock engine's answer has
    nothing in our fields.

    Args:
        worker: pipeline and tensor-parallel rank.

    Raises:
        zmq.Again: no answer.
        msgspec.MsgspecError: it is none.
    """
    with zmq_ctx(zmq.REQ, make_zmq_path("tcp", host, port)) as socket:
        socket.setsockopt(zmq.RCVTIMEO, int(_LONGEST_PATIENCE * 1e3))
        socket.send(msgspec.msgpack.encode((GET_META_MSG, *worker)))
        return msgspec.msgpack.decode(socket.recv_multipart()[0], type=HandshakePayload)
