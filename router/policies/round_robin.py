"""One after the other, whatever they have to do."""

from __future__ import annotations

from collections.abc import Sequence

from router.candidates import Candidate, Query


def choose(candidates: Sequence[Candidate], query: Query) -> Candidate:
    return candidates[query.turn % len(candidates)]
