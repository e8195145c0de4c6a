"""All requests of a session to one engine, as long as that one has not much more to do than the others.

Rendezvous hashing: an engine that comes or goes moves only its own sessions, and every router agrees without talking.
The bound on the load is that of consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam): an engine
with more than MAX_LOAD times the mean is passed over for the session's next one. Requests without a session go to the
least loaded engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from router.candidates import Candidate, Query
from router.policies.least_loaded import choose as least_loaded

MAX_LOAD = 1.25
FREE_LOAD = 8192  # tokens outstanding; with fewer than that nobody waits long enough to leave a warm cache for it


def choose(candidates: Sequence[Candidate], query: Query) -> Candidate:
    if query.session is None:
        return least_loaded(candidates, query)
    mean = (sum(c.num_tokens for c in candidates) + query.num_tokens) / len(candidates)
    bound = max(MAX_LOAD * mean, FREE_LOAD)
    session = query.session.encode(errors="surrogatepass")
    return max((c for c in candidates if c.num_tokens <= bound), key=lambda c: _score(session, c.url))


def _score(session: bytes, url: str) -> bytes:
    return blake2b(session + b"\0" + url.encode(), digest_size=8).digest()
