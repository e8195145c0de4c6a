"""The engine with the least work until it has the prompt: what it has to do already, and what it lacks of the prompt.

So a cached prefix is worth as many tokens of load as it saves, and an engine that everybody's prefix lives on does not
get everybody's requests. Which tokens an engine has cached is what its KV events say, if it publishes any, and
otherwise what this router sent it (router/prefix.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from router.candidates import Candidate, Query


def choose(candidates: Sequence[Candidate], query: Query) -> Candidate:
    def work(c: Candidate) -> tuple[int, int, int]:
        return c.num_tokens + query.num_prompt_tokens - c.num_cached_tokens, c.num_requests, c.num_chosen

    return min(candidates, key=work)
