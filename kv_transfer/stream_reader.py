"""What a decode worker hears of streams (kv_transfer.stream_source, kv_transfer.layer_source)."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from vllm.logger import init_logger

from kv_transfer.layer_source import LAYERS
from kv_transfer.side_channel import SideChannelClient
from kv_transfer.stream_source import END, OVER, PROGRESS, SUBSCRIBE, UNSUBSCRIBE

logger = init_logger(f"vllm.{__name__}")


@dataclass
class StreamState:
    """What the scheduler, or a worker, of a prefill engine has said last; see their messages.

    Attributes:
        num_tokens, block_ids: complete, or, of a worker, in the first `num_regions` alone those after
            `num_tokens_before`.
        is_over: also when it is gone.
        heard: when it said something last, or was asked to, by time.monotonic().
    """

    generation: int = 0
    num_tokens_before: int = 0
    num_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)
    num_regions: int = 0
    end: dict[str, Any] | None = None
    is_over: bool = False
    heard: float = field(default_factory=time.monotonic)

    def take(self, kind: str, news: list[Any]) -> None:
        """Raises ValueError, TypeError or AttributeError for what no engine of ours sends."""
        self.heard = time.monotonic()
        if kind == PROGRESS:
            self.generation, self.num_tokens, self.block_ids = news
        elif kind == LAYERS:
            self.generation, self.num_tokens_before, self.num_tokens, self.block_ids, self.num_regions = news
        elif kind == END:
            (params,) = news
            if not {"remote_block_ids", "remote_request_id"} <= params.keys():
                raise ValueError("an end without an offer")
            self.end = params
        elif kind == OVER:
            self.is_over = True


class StreamReader:
    """A connection to each process that tells of streams, and what they said. For one thread."""

    def __init__(self) -> None:
        self._clients: dict[str, SideChannelClient] = {}  # by address
        self._states: dict[str, dict[str, StreamState]] = {}  # by stream and address

    def subscribe(self, address: str, stream: str) -> StreamState:
        """Raises ValueError if there is no address."""
        if not address:
            raise ValueError("the prefill engine streams nothing")
        client = self._clients.get(address)
        if client is None or client.is_gone:
            client = self._clients[address] = SideChannelClient(address)
        client.send(SUBSCRIBE, stream)
        state = self._states.setdefault(stream, {})[address] = StreamState()
        return state

    def unsubscribe(self, stream: str) -> None:
        """Of streams that are not subscribed to, nothing."""
        for address in self._states.pop(stream, ()):
            if client := self._clients.get(address):
                client.send(UNSUBSCRIBE, stream)

    def poll(self) -> None:
        """Brings all states up to date. Returns at once."""
        for address, client in list(self._clients.items()):
            for kind, body in client.receive():
                self._take(address, kind, body)
            if client.is_gone:
                for states in self._states.values():
                    if address in states:
                        states[address].is_over = True
                client.close()
                del self._clients[address]

    def _take(self, address: str, kind: str, body: Any) -> None:
        try:
            stream, *news = body
            if state := self._states.get(stream, {}).get(address):
                state.take(kind, news)
        except (TypeError, ValueError, AttributeError):
            logger.warning("the prefill engine at %s said something of a stream that is not understood", address)

    def close(self) -> None:
        for client in self._clients.values():
            client.close()
