"""Which engines serve a model right now: what follows from the state of all of them, kept until one changes.

Each request asks this several times, and a pool may have a hundred engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from router.fit import misfit
from router.types import JsonObject, Role

if TYPE_CHECKING:
    from router.engines import Engine


class Roster:
    """Of one model."""

    def __init__(self, engines: Sequence[Engine], model: str) -> None:
        up = [e for e in engines if e.is_up and not e.is_draining and model in e.models]
        self._of = {role: _not_failing([e for e in up if e.endpoint.role is role]) for role in Role}
        self._readers: dict[Engine, Sequence[Engine]] = {}

    def of(self, role: Role) -> Sequence[Engine]:
        """The engines that its requests may be sent to."""
        return self._of[role]

    def readers(self, prefill: Engine) -> Sequence[Engine]:
        """Of the decode engines, those that can read the KV cache of `prefill`."""
        if prefill not in self._readers:
            self._readers[prefill] = tuple(d for d in self._of[Role.DECODE] if misfit(prefill, d) is None)
        return self._readers[prefill]

    @cached_property
    def readable(self) -> Sequence[Engine]:
        """Of the prefill engines, those whose KV cache some decode engine can read."""
        return tuple(p for p in self._of[Role.PREFILL] if self.readers(p))


class Rosters:
    """Of all models."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = engines
        self._by_model: dict[str, Roster] = {}
        decode = [e for e in engines if e.endpoint.role is Role.DECODE]
        self.known = {name for e in decode for name in e.models}  # a dead engine's too
        self.cards: dict[str, JsonObject] = {name: card for e in decode if e.is_up for name, card in e.models.items()}

    def of(self, model: str) -> Roster:
        roster = self._by_model.get(model)
        if roster is None:
            roster = Roster(self._engines, model)
            if model in self.known:  # other names are whatever clients send
                self._by_model[model] = roster
        return roster


def _not_failing(engines: Sequence[Engine]) -> Sequence[Engine]:
    # Where all of them fail requests, that says more about the requests or the network than about one of them.
    return tuple(e for e in engines if not e.breaker.is_open) or tuple(engines)
