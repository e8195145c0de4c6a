"""The less loaded of two that are drawn at random.

For several routers in front of the same engines: each sees its own requests only, and least_loaded would make all of
them prefer the same engine at the same time (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing").
"""

from __future__ import annotations

from collections.abc import Sequence

from router.candidates import Candidate, Query


def choose(candidates: Sequence[Candidate], query: Query) -> Candidate:
    first = int(query.draws[0] * len(candidates))
    other = int(query.draws[1] * (len(candidates) - 1))
    other += other >= first  # two different ones
    return min(candidates[first], candidates[other], key=lambda c: (c.num_tokens, c.num_requests))
