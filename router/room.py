"""The room for KV cache on each rank of a decode engine.

An engine says how much is free right now. What its requests will still grow by is not in that, nor what this router
sent it since: both are taken off here, so that a request goes where it can stay until its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from router.candidates import Candidate
from router.types import JsonObject, Role


@dataclass(frozen=True, slots=True)
class RankKv:
    """What an engine told of one rank's KV cache."""

    rank: int
    num_blocks: int
    num_free_blocks: int
    block_size: int  # tokens
    num_requests: int | None = None  # that live there, whoever sent them; None if it does not tell

    @property
    def num_used_tokens(self) -> int:
        return (self.num_blocks - self.num_free_blocks) * self.block_size


@dataclass(frozen=True, slots=True)
class Committed:
    """What this router's requests on one engine may grow to, in tokens."""

    num_sequences: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0


def expected_rooms(ranks: Sequence[RankKv], committed: Committed) -> list[int]:
    """Tokens that each rank has to spare if every outstanding request grows to its end; negative if it can't.

    Of the tokens that are committed, those that the engine uses already are not expected again. Requests that share a
    prefix use fewer than their sum, which must not look like growth: the output budgets, and the prompts of requests
    that have not arrived, are all that can still come. The growth is spread over the ranks by the requests on each.
    """
    num_living = sum(rank.num_requests or 0 for rank in ranks)
    tells = all(rank.num_requests is not None for rank in ranks)
    own_share = min(1.0, committed.num_sequences / num_living) if num_living else float(not tells)
    used = sum(rank.num_used_tokens for rank in ranks) * own_share
    num_coming = max(0, committed.num_sequences - num_living) if tells else committed.num_sequences
    coming = committed.num_prompt_tokens * num_coming / max(1, committed.num_sequences)
    total = committed.num_prompt_tokens + committed.num_output_tokens
    growth = max(0.0, min(total - used, committed.num_output_tokens + coming))
    shares = [(rank.num_requests or 0) / num_living if num_living else 1 / len(ranks) for rank in ranks]
    return [r.num_free_blocks * r.block_size - round(growth * share) for r, share in zip(ranks, shares, strict=True)]


def place(rooms: list[int], num_tokens: int, num_sequences: int) -> tuple[int, ...]:
    """Takes the room of that many sequences, each from the rank with the most, as the engine will do or nearly so.

    Returns the index of each one's rank.
    """
    chosen = []
    for _ in range(num_sequences):
        index = max(range(len(rooms)), key=rooms.__getitem__)
        rooms[index] -= num_tokens
        chosen.append(index)
    return tuple(chosen)


def has_room(engines: Iterable[Sequence[int] | None], num_tokens: int, num_sequences: int = 1) -> bool:
    """Whether some engine has a rank for every one of the sequences, each of `num_tokens` with its output.

    `engines` holds the rooms of each engine's ranks, in tokens. One that does not tell (None) is taken to have room:
    refusing on ignorance would close a pool of stock engines for good.
    """
    return any(rooms is None or _fits(rooms, num_tokens, num_sequences) for rooms in engines)


def with_room(candidates: Sequence[Candidate], num_tokens: int, num_sequences: int) -> Sequence[Candidate]:
    """The candidates that can hold the request, or else the one with the most room on a rank. Never empty."""
    roomy = [c for c in candidates if c.rooms is None or _fits(c.rooms, num_tokens, num_sequences)]
    return roomy or [max(candidates, key=lambda c: max(c.rooms or (0,)))]


def _fits(rooms: Sequence[int], num_tokens: int, num_sequences: int) -> bool:
    if num_sequences == 1:
        return max(rooms, default=0) >= num_tokens
    return num_tokens <= 0 or sum(max(0, room) // num_tokens for room in rooms) >= num_sequences


class KvRoom:
    """The rooms of one engine, from poll to poll."""

    def __init__(self) -> None:
        self.ranks: tuple[RankKv, ...] = ()
        self.rooms: list[int] | None = None  # tokens, in the order of `ranks`
        self.capacity: int | None = None  # tokens of the largest rank, None if not known
        self.unknown = "not asked yet"  # why `rooms` is None
        self._num_sequences = self._num_prompt_tokens = self._num_output_tokens = 0

    def tell(self, ranks: Sequence[RankKv]) -> None:
        """Takes over what the engine told just now; at least one rank."""
        self.ranks = tuple(ranks)
        self.rooms = expected_rooms(self.ranks, self.committed)
        self.capacity = max(rank.num_blocks * rank.block_size for rank in ranks)
        self.unknown = ""

    def forget(self, why: str) -> None:
        self.ranks, self.rooms, self.capacity, self.unknown = (), None, None, why

    @property
    def committed(self) -> Committed:
        return Committed(self._num_sequences, self._num_prompt_tokens, self._num_output_tokens)

    @property
    def is_idle(self) -> bool:
        """Whether this router has nothing there."""
        return not self._num_sequences

    def spares(self, num_tokens: int, share: float) -> bool:
        """Whether a rank that took so many tokens would still have that share of its KV cache to spare; not believed of
        an engine that does not tell."""
        return self.rooms is not None and any(
            room - num_tokens >= share * rank.num_blocks * rank.block_size
            for room, rank in zip(self.rooms, self.ranks, strict=True)
        )

    def as_dict(self, role: Role) -> JsonObject:
        """What /ready shows of a decode engine: `kv_ranks`, or why they are not known."""
        if role is not Role.DECODE:
            return {}
        if self.rooms is None:
            return {"kv_ranks": None, "kv_unknown": self.unknown}
        return {
            "kv_ranks": [
                {
                    "rank": rank.rank,
                    "num_blocks": rank.num_blocks,
                    "num_free_blocks": rank.num_free_blocks,
                    "block_size": rank.block_size,
                    "room_tokens": room,
                }
                for rank, room in zip(self.ranks, self.rooms, strict=True)
            ]
        }

    def take(self, num_prompt_tokens: int, num_output_tokens: int, num_sequences: int) -> tuple[int, ...]:
        """Returns what `give_back` wants, with the same numbers."""
        self._commit(num_prompt_tokens, num_output_tokens, num_sequences)
        if self.rooms is None:
            return ()
        return place(self.rooms, self._rounded(num_prompt_tokens + num_output_tokens), num_sequences)

    def give_back(
        self, placed: Sequence[int], num_prompt_tokens: int, num_output_tokens: int, num_sequences: int
    ) -> None:
        self._commit(num_prompt_tokens, num_output_tokens, -num_sequences)
        if self.rooms is None:
            return
        for index in placed:
            if index < len(self.rooms):  # an engine may have come back with fewer
                self.rooms[index] += self._rounded(num_prompt_tokens + num_output_tokens)

    def _commit(self, num_prompt_tokens: int, num_output_tokens: int, num_sequences: int) -> None:
        self._num_sequences += num_sequences
        self._num_prompt_tokens += num_sequences * num_prompt_tokens
        self._num_output_tokens += num_sequences * num_output_tokens

    def _rounded(self, num_tokens: int) -> int:
        """To whole blocks; what no rank could hold is cut to the largest, which an engine refuses or serves itself."""
        block_size = self.ranks[0].block_size
        return min(-(-num_tokens // block_size) * block_size, self.capacity or 0)
