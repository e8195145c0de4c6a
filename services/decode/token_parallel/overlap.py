"""Whether two micro-batches pay in a decode step: a rule from what was measured at start, which every rank, and the
placement of requests, works out alike."""

from __future__ import annotations

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
    the root, which is given less attention for that, computes its products twice: a step then takes as long as the
    root's products or, if that is longer, a rank's share of all the work.

    Attributes:
        block_seconds: of attention to a KV block, in all layers.
        num_ranks: token-parallel ranks.
    """

    root: RootPace
    block_seconds: float
    num_ranks: int

    def pays(self, num_rows: int, num_blocks: int) -> bool:
        """Whether a step of so many rows, over so many KV blocks of all ranks, is faster in two micro-batches; asked of
        steps that can run so."""
        if not self.root.whole:
            return True
        whole = float(np.interp(num_rows, self.root.rows, self.root.whole))
        halved, attention = self._halved(num_rows), num_blocks * self.block_seconds
        overlapped = max(halved, (halved + attention) / self.num_ranks) + self.root.num_layers * _LOSS_SECONDS
        return overlapped < whole + attention / self.num_ranks

    def root_work(self, num_rows: int, num_blocks: int) -> int:
        """Blocks whose attention takes as long as what else the root does in such a step while others attend."""
        if num_rows < self.root.rows[0] or not self.pays(num_rows, num_blocks):
            return 0
        return round(self._halved(num_rows) / self.block_seconds)

    def _halved(self, num_rows: int) -> float:
        return float(np.interp(num_rows, self.root.rows, self.root.halved))


_overlap: Overlap | None = None


def set_overlap(overlap: Overlap | None) -> None:
    """In the engine's process, once it was measured."""
    global _overlap
    _overlap = overlap


def get_overlap() -> Overlap | None:
    """Where requests are placed; None if steps never overlap."""
    return _overlap
