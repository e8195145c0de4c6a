"""A prefill worker tells how many layers of a chunk of a prompt its GPU has computed, so that readers need not wait for
the whole chunk.

Who subscribes to a stream (kv_transfer.stream_source) on the side channel of a worker gets:

    layers  [stream, generation, num_tokens_before, num_tokens, block_ids, num_regions]: of the tokens from
            `num_tokens_before` to `num_tokens` the KV cache is complete in the first `num_regions` of the worker's
            registered regions, which are its layers; of those before, in all

vLLM calls a hook after each layer's attention, but not where a CUDA graph holds the whole model: then nothing is told.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from queue import SimpleQueue
from typing import Any

import torch

from kv_transfer.side_channel import Peer, SideChannel
from kv_transfer.stream_source import SUBSCRIBE, UNSUBSCRIBE, Chunk

LAYERS = "layers"

_NUM_GROUPS = 12
"""Times that a chunk is told of, at most: the last group is what is left of a chunk when it has been computed."""


class LayerSource:
    """Of one worker."""

    def __init__(self, channel: SideChannel, region_names: Sequence[str], on_gpu: bool) -> None:
        """Args:
        region_names: the layer of each registered region, in their order.
        on_gpu: layers are computed later than the hook is called.
        """
        self._channel = channel
        self._names = list(region_names)
        self._on_gpu = on_gpu
        self._group = -(-len(self._names) // _NUM_GROUPS)
        self._orders: Any = None  # of the step that is computed
        self._saved: set[str] = set()
        self._num_regions = self._num_told = 0
        self._lock = threading.Lock()  # over the next two
        self._readers: dict[str, set[Peer]] = {}
        self._last: dict[str, list[Any]] = {}  # that was told, for those who subscribe late
        self._events: SimpleQueue[tuple[Any, Mapping[str, Chunk], int] | None] = SimpleQueue()
        channel.handle(SUBSCRIBE, self._subscribe)
        channel.handle(UNSUBSCRIBE, self._unsubscribe)
        channel.on_gone(self._drop)
        self._thread = threading.Thread(target=self._tell, name="tknp-kv-layers", daemon=True)
        self._thread.start()

    def saved(self, layer_name: str, orders: Any) -> None:
        """A layer's attention, and the writing of its KV cache, was launched. On the thread that computes.

        Args:
            orders: of the step, TokenParallelConnectorMetadata.
        """
        if orders is not self._orders:
            self._orders, self._saved, self._num_regions, self._num_told = orders, set(), 0, 0
        self._saved.add(layer_name)
        while self._num_regions < len(self._names) and self._names[self._num_regions] in self._saved:
            self._num_regions += 1
        is_last = self._num_regions == len(self._names)
        if self._num_regions - self._num_told >= self._group or (is_last and self._num_told < self._num_regions):
            self._num_told = self._num_regions
            event = torch.cuda.Event(blocking=True) if self._on_gpu else None
            if event is not None:
                event.record()
            self._events.put((event, orders.chunks, self._num_regions))

    def close(self) -> None:
        self._events.put(None)
        self._thread.join()

    def _tell(self) -> None:
        while (item := self._events.get()) is not None:
            event, chunks, num_regions = item
            if event is not None:
                event.synchronize()
            told = {
                name: [name, c.generation, c.num_tokens_before, c.num_tokens, c.block_ids, num_regions]
                for name, c in chunks.items()
            }
            with self._lock:
                self._last = told
                for name, body in told.items():
                    for reader in self._readers.get(name, ()):
                        self._channel.send(reader, LAYERS, body)

    def _subscribe(self, peer: Peer, name: Any) -> None:
        with self._lock:
            self._readers.setdefault(name, set()).add(peer)
            if name in self._last:
                self._channel.send(peer, LAYERS, self._last[name])

    def _unsubscribe(self, peer: Peer, name: Any) -> None:
        with self._lock:
            readers = self._readers.get(name, set())
            readers.discard(peer)
            if not readers:
                self._readers.pop(name, None)

    def _drop(self, peer: Peer) -> None:
        with self._lock:
            self._readers = {name: left for name, readers in self._readers.items() if (left := readers - {peer})}
