"""Whether two micro-batches pay in a decode step: a rule from what was measured at start, which every rank, and the
placement of requests, works out alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_LOSS_SECONDS = 45e-6
"""Of a layer, beyond what the rule adds up: two halves have more kernels, attention that is cut less evenly, and a
first half that nothing hides. From 8B's shape on two H200s (docs/performance.md, Two micro-batches)."""


@dataclass(frozen=True)
class RootPace:
    """What a root takes for decode steps in which it owns no row.

    Attributes:
        num_layers: attention layers of the model.
        rows: of the steps that were measured, ascending.
        halved: seconds of each in two micro-batches.
        whole: seconds of each in one; empty where there is no such graph, so that there is nothing to choose.
    """

    num_layers: int
    rows: tuple[int, ...]
    halved: tuple[float, ...]
    whole: tuple[float, ...] = ()


@dataclass(frozen=True)
class Overlap:
    """The rule.

    In one micro-batch the root's matrix products and everybody's attention follow one another; in two they overlap, and
    the root, which is given less attention for that, reads its weights twice. Either takes as long as its last rank.

    Attributes:
        block_seconds: of attention to a KV block, in all layers.
        num_ranks: token-parallel ranks.
    """

    root: RootPace
    block_seconds: float
    num_ranks: int

    def pays(self, num_rows: int, blocks_by_rank: Sequence[int]) -> bool:
        """Whether a step of so many rows is faster in two micro-batches; asked of steps that can run so.

        Args:
            blocks_by_rank: KV blocks that each rank attends to, the root's first.
        """
        attention = [blocks * self.block_seconds for blocks in blocks_by_rank]
        return self._is_faster(num_rows, max(self._halved(num_rows) + attention[0], *attention), max(attention))

    def root_work(self, num_rows: int, num_blocks: int) -> int:
        """Blocks whose attention takes as long as what else the root does while others attend, in steps of so many rows
        over so many blocks of all ranks, if they are to overlap: placement goes ahead, and steps follow."""
        halved, attention = self._halved(num_rows), num_blocks * self.block_seconds
        shared = max(halved, (halved + attention) / self.num_ranks)
        can = self.root.rows[0] <= num_rows <= self.root.rows[-1]
        if not can or not self._is_faster(num_rows, shared, attention / self.num_ranks):
            return 0
        return round(halved / self.block_seconds)

    def _is_faster(self, num_rows: int, halved_seconds: float, attention_seconds: float) -> bool:
        """Two micro-batches in which the last rank takes so long, or one behind whose products the last rank attends
        for so long."""
        if not self.root.whole:
            return True
        whole = float(np.interp(num_rows, self.root.rows, self.root.whole))
        return halved_seconds + self.root.num_layers * _LOSS_SECONDS < whole + attention_seconds

    def _halved(self, num_rows: int) -> float:
        return float(np.interp(num_rows, self.root.rows, self.root.halved))


_overlap: Overlap | None = None


def set_overlap(overlap: Overlap | None) -> None:
    """In the engine's process, once it was measured."""
    global _overlap
    _overlap = overlap


def get_overlap() -> Overlap | None:
    """Where requests are placed; None if steps don't overlap."""
    return _overlap
