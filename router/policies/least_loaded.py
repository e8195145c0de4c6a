"""The engine with the fewest tokens outstanding; among equals the one that has had the fewest requests so far.

Tokens and not requests, because one prompt can be a thousand times another.
"""

from __future__ import annotations

from collections.abc import Sequence

from router.candidates import Candidate, Query


def choose(candidates: Sequence[Candidate], query: Query) -> Candidate:
    return min(candidates, key=lambda c: (c.num_tokens, c.num_requests, c.num_chosen))
