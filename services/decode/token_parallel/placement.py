"""Which token-parallel rank a request goes to: one pure function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_SPREAD = 0.2
"""Difference in load, as a share of the largest rank's room, above which balance counts more than a prefix hit."""

FEW_BLOCKS = 2
"""A request that needs so few beyond the hit, to its end, adds nothing to the load there, such as one that has KV cache
kept for a prefill engine; elsewhere it would compute all of its prompt."""


@dataclass(frozen=True)
class RankState:
    """What placement knows of one rank.

    Attributes:
        num_blocks: KV blocks that requests can use.
        num_free_blocks: of those, free now.
        expected_blocks: blocks that its requests are expected to grow to.
        num_requests: requests that live on it.
        num_hit_tokens: tokens of the new request that its prefix cache holds.
        num_needed_blocks: blocks that the new request would take from it now, beyond the hit.
        num_hit_blocks: of the hit.
        other_work: blocks whose attention takes as long as what else the rank does while others attend; on a root whose
            steps overlap, its matrix products.
    """

    num_blocks: int
    num_free_blocks: int
    expected_blocks: int
    num_requests: int
    num_hit_tokens: int
    num_needed_blocks: int
    other_work: int = 0
    num_hit_blocks: int = 0

    @property
    def load(self) -> int:
        """Expected work of the rank in a step, in blocks: a step ends when the last rank does."""
        return self.expected_blocks + self.other_work

    @property
    def has_room(self) -> bool:
        """Whether its requests and the new one are expected to find room to the end."""
        return self.expected_blocks + self.num_needed_blocks <= self.num_blocks


def choose_rank(ranks: Sequence[RankState], max_request_blocks: int) -> int:
    """The rank for a request that may grow to `max_request_blocks`.

    A rank that the request could outgrow is out: it would preempt everything there and then itself, for ever. Of the
    others, one that has all of it but `FEW_BLOCKS` comes first, then one where it fits now, then one where all are
    expected to fit to the end; then the longest prefix hit, unless the loads already differ by more than `MAX_SPREAD`;
    then the least loaded. Ties go to the highest rank, because the root has the dense work as well.
    """
    capable = [r for r, state in enumerate(ranks) if state.num_blocks >= max_request_blocks]
    if not capable:
        # `max_request_blocks` is an upper bound, and the engine has checked that the largest rank can hold the longest
        # request.
        largest = max(state.num_blocks for state in ranks)
        capable = [r for r, state in enumerate(ranks) if state.num_blocks == largest]
    loads = [ranks[r].load for r in capable]
    balanced = max(loads) - min(loads) <= MAX_SPREAD * max(ranks[r].num_blocks for r in capable)

    def preference(r: int) -> tuple[bool, bool, bool, int, int, int, int]:
        state = ranks[r]
        fits = state.num_free_blocks >= state.num_needed_blocks
        is_there = fits and max_request_blocks - state.num_hit_blocks <= FEW_BLOCKS < state.num_hit_blocks
        hit = state.num_hit_tokens if balanced else 0
        return is_there, fits, state.has_room, hit, -state.load, -state.num_requests, r

    return max(capable, key=preference)
