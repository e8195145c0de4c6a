"""What one engine has from this router: tokens outstanding, room for KV cache, and the prefixes that it has cached."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from router.prefix import PrefixIndex
from router.room import KvRoom
from router.types import Role

if TYPE_CHECKING:
    from router.demand import Demand
    from router.event_index import EventIndex

PREFIX_BLOCKS = 50_000
"""Blocks of text that are remembered for an engine: 3 million tokens, about 6 MB here."""


class Share(NamedTuple):
    """What one leg takes from an engine; given back as it was taken, whatever became of the estimate meanwhile."""

    num_tokens: int
    placed: tuple[int, ...] = ()
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_sequences: int = 0


def leg_tokens(role: Role, demand: Demand) -> int:
    """Tokens that count as outstanding on an engine of that role while it has the request."""
    return demand.num_prompt_tokens if role is Role.PREFILL else demand.num_total_tokens


class EngineLoad:
    def __init__(self, role: Role) -> None:
        self._role = role
        self.num_tokens = 0
        self.kv = KvRoom()
        self.prefixes = PrefixIndex(PREFIX_BLOCKS)
        self.events: EventIndex | None = None  # the engine's own word on its cache, while its KV events arrive

    def begin(self, demand: Demand) -> Share:
        """A leg is sent."""
        num_tokens = leg_tokens(self._role, demand)
        self.num_tokens += num_tokens
        self.prefixes.insert(demand.prefix)
        if self._role is Role.PREFILL:
            return Share(num_tokens)
        numbers = demand.num_prompt_tokens, demand.num_output_tokens, demand.num_choices
        return Share(num_tokens, self.kv.take(*numbers), *numbers)

    def end(self, share: Share) -> None:
        """The leg ended, however it did."""
        self.num_tokens -= share.num_tokens
        if self._role is Role.DECODE:
            self.kv.give_back(share.placed, share.num_prompt_tokens, share.num_output_tokens, share.num_sequences)

    def forget(self, why: str) -> None:
        """The engine went down: what comes back has an empty cache."""
        self.kv.forget(why)
        self.prefixes.clear()

    def num_cached_tokens(self, demand: Demand) -> int:
        """Tokens of the prompt that the engine has cached, as far as is known."""
        if self.events is not None and demand.token_ids is not None:
            return self.events.match(demand.token_ids)
        if not demand.prefix:
            return 0
        return int(self.prefixes.match(demand.prefix) * demand.prefix_share * demand.num_prompt_tokens)
