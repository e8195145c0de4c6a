"""What a worker process knows about its place in token-parallel attention, shared by worker, builders and attention
layers.

vLLM makes attention backends from their class names, so they cannot be handed anything; like vLLM's own process
groups, the context of this process is kept here. A process holds one worker.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from services.decode.token_parallel.batch import Batch
from services.decode.token_parallel.graphs import Graphs
from services.decode.token_parallel.step import RootStep
from services.decode.token_parallel.transport import Transport


@dataclass
class WorkClock:
    """Seconds that this rank spent, since it started.

    On a device that works asynchronously these are host seconds; see docs/metrics.md.
    """

    step_seconds: float = 0.0
    """In steps that ran the model."""
    wait_seconds: float = 0.0
    """Of those, waiting for other ranks' rows: on the root for attention outputs, on a KV worker for queries."""
    num_steps: int = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.step_seconds += time.perf_counter() - started
        self.num_steps += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.wait_seconds += time.perf_counter() - started


@dataclass
class TokenParallelContext:
    """State of one rank.

    Attributes:
        rank: token-parallel rank; 0 is the root.
        shard: which part of the KV heads this worker has.
        is_spread: whether every rank runs the model, with a part of the weights and of the query heads.
        batch: the live requests, once the KV cache exists.
        group_of_layer: KV cache group index of each attention layer's name, in the order in which the model runs them.
        row_request_ids: on the root, the request of each row of a batch, in row order, from its
            CommonAttentionMetadata.
        graphs: for steps that replay FULL CUDA graphs; None where there can be none.
        live: whether the forward pass that runs is a step of real requests; profiling and warm-up stay on the root.
    """

    rank: int
    size: int
    transport: Transport
    batch: Batch | None = None
    group_of_layer: dict[str, int] = field(default_factory=dict)
    row_request_ids: Callable[[Any], list[str]] | None = None
    live: bool = False
    graphs: Graphs | None = None
    shard: int = 0
    is_spread: bool = False
    clock: WorkClock = field(default_factory=WorkClock)
    _step: RootStep | None = None
    _longest: list[int] | None = None

    @property
    def head_shares(self) -> int:
        """Workers whose query heads this one attends with: all that have its KV heads, if the model is spread."""
        return self.size if self.is_spread else 1

    @contextmanager
    def live_step(self) -> Iterator[None]:
        """Marks the forward passes inside as a step of real requests."""
        assert self.batch is not None
        self.live, self._step, self._longest = True, None, None
        if self.graphs is not None:
            self.graphs.begin_step(self.batch)
        try:
            with self.clock.step():
                yield
        finally:
            self.live, self._step = False, None

    def root_step(self, common_attn_metadata: Any) -> RootStep:
        """The step that runs; made from the first KV cache group's metadata and shared by all groups and layers."""
        if self._step is None:
            assert self.batch is not None and self.row_request_ids is not None
            requests = self.row_request_ids(common_attn_metadata)
            self._step = RootStep.plan(self.batch, requests, common_attn_metadata, iter(self.group_of_layer))
        return self._step

    def write_graph_inputs(self, common_attn_metadata: Any) -> list[int]:
        """Where the model runs, once per step: writes what the captured graph reads; the longest sequence of each
        micro-batch.

        Raises:
            RuntimeError: vLLM runs another graph than the other ranks expect.
        """
        if self._longest is None:
            assert self.batch is not None and self.row_request_ids is not None
            assert self.graphs is not None and self.graphs.step is not None
            step = self.graphs.step
            if common_attn_metadata.num_actual_tokens != step.size:
                raise RuntimeError(
                    f"vLLM pads this decode step to {common_attn_metadata.num_actual_tokens} rows where other ranks "
                    f"expect the CUDA graph of {step.size}; start the engine with --enforce-eager and report this"
                )
            batch_row = {request: row for row, request in enumerate(self.row_request_ids(common_attn_metadata))}
            self._longest = self.graphs.write_inputs(self.batch, batch_row)
        return self._longest


_context: TokenParallelContext | None = None


def set_context(context: TokenParallelContext | None) -> None:
    """Called by the worker when its device is ready."""
    global _context
    _context = context


def get_context() -> TokenParallelContext | None:
    """This process's context; None in a process that is not a token-parallel worker."""
    return _context
