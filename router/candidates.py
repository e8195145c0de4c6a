"""What a policy sees: the engines that can take a request, and the request, as plain data.

A policy is one file in router/policies/ with one pure function,

    def choose(candidates: Sequence[Candidate], query: Query) -> Candidate

which gets at least two candidates and returns one of them. The file's name is the policy's name in the settings.
Whatever it would have to remember or draw is in its arguments, so that it can be tested by a table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Candidate(NamedTuple):
    """One engine and its load from this router."""

    position: int  # in the list that the chooser made the candidates from
    url: str
    num_requests: int  # outstanding
    num_tokens: int  # outstanding; prompts on a prefill engine, prompts and output budgets on a decode engine
    num_chosen: int  # requests that it ever had
    num_cached_tokens: int = 0  # of the request's prompt, as far as is known; 0 where nothing asks for it
    rooms: tuple[int, ...] | None = None  # tokens of KV cache that each rank has to spare; None if not known


class Query(NamedTuple):
    """The request."""

    num_prompt_tokens: int
    num_sequence_tokens: int  # prompt and output budget of one choice
    num_tokens: int  # that it adds to the engine's num_tokens
    session: str | None = None
    turn: int = 0  # how many choices of this role came before
    draws: tuple[float, float] = (0.0, 0.0)  # random, in [0, 1)


Policy = Callable[[Sequence[Candidate], Query], Candidate]
