"""Chooses engines by the policies of the settings: gathers what a policy wants to know, and asks it."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from router.candidates import Candidate, Query
from router.conditional import local_prefill
from router.demand import TokenEstimator, given_token_ids, is_plain, output_budget, prompt_size
from router.load import leg_tokens
from router.policies import load_policies
from router.prefix import prefix_blocks
from router.prompt import prompt_fields
from router.room import with_room
from router.types import Api, LocalPrefill, Role

if TYPE_CHECKING:
    from router.demand import Demand
    from router.engines import Engine
    from router.settings import RouterSettings
    from router.types import GenerationRequest, JsonObject

logger = logging.getLogger(__name__)


class Chooser:
    """Both roles' policies, and what they need between two requests."""

    def __init__(self, settings: RouterSettings) -> None:
        policies = load_policies()
        names = {Role.PREFILL: settings.prefill_policy, Role.DECODE: settings.decode_policy}
        self._settings = settings
        self._policies = {role: policies[name] for role, name in names.items()}
        self._turns = dict.fromkeys(Role, 0)
        self._estimator = TokenEstimator()
        self._decode_only: dict[str, bool] = {}  # by model, as it was logged
        self.roles_with_prefixes = {role for role, name in names.items() if name == "prefix_aware"}
        if settings.local_prefill_tokens:
            self.roles_with_prefixes.add(Role.DECODE)
        if settings.pull_back_tokens:
            self.roles_with_prefixes |= set(Role)
        self.looks_at_prefixes = bool(self.roles_with_prefixes)
        self.serves_decode_only = settings.decode_only

    def describe(self, request: GenerationRequest, session: str | None, card: JsonObject) -> None:
        """Fills in the request's demand from its body, once."""
        demand, body = request.demand, request.body
        prompt = prompt_fields(request.api, body)
        counted, num_bytes = prompt_size(prompt)
        demand.num_prompt_bytes = num_bytes
        demand.num_prompt_tokens = counted + self._estimator.num_tokens(request.model, num_bytes)
        context = card.get("max_model_len")
        demand.num_output_tokens = output_budget(
            body,
            demand.num_prompt_tokens,
            context if isinstance(context, int) else None,
            self._settings.default_output_tokens,
        )
        demand.num_choices = request.num_choices
        demand.session = session
        if session is None and isinstance(user := body.get("user"), str):
            demand.session = user
        if self.looks_at_prefixes and request.local_prefill is None:
            demand.prefix, demand.prefix_share = prefix_blocks(request.model, prompt)
            # An engine's /tokenize takes no input of the Responses API.
            demand.is_plain = request.api is not Api.RESPONSES and is_plain(prompt, card)
            demand.token_ids = given_token_ids(prompt) if demand.is_plain else None

    def counted(self, request: GenerationRequest, num_prompt_tokens: int) -> None:
        """A prefill engine has counted the prompt's tokens: the decode engine is chosen by what is true."""
        demand = request.demand
        self._estimator.observe(request.model, demand.num_prompt_bytes, num_prompt_tokens)
        demand.num_prompt_tokens, demand.num_prompt_bytes = num_prompt_tokens, 0

    def choose(self, role: Role, engines: Sequence[Engine], demand: Demand) -> Engine:
        """One of the engines, of which there is at least one."""
        if len(engines) == 1:
            return engines[0]
        candidates: Sequence[Candidate] = self._candidates(role, engines, demand)
        if role is Role.DECODE:
            candidates = _cached_enough(candidates, demand)
            candidates = with_room(candidates, demand.num_sequence_tokens, demand.num_choices)
        turn = self._turns[role]
        self._turns[role] = turn + 1
        if len(candidates) == 1:
            return engines[candidates[0].position]
        query = Query(
            demand.num_prompt_tokens,
            demand.num_sequence_tokens,
            leg_tokens(role, demand),
            demand.session,
            turn,
            (random.random(), random.random()),
        )
        return engines[self._policies[role](candidates, query).position]

    def local_prefill(
        self, prefill: Sequence[Engine], decode: Sequence[Engine], request: GenerationRequest
    ) -> LocalPrefill | None:
        """Why the request should skip the remote prefill, by what is known right now; None if it should not."""
        self.note_decode_only(request.model, bool(decode) and not prefill)
        if not prefill:
            return LocalPrefill.NO_PREFILL_ENGINE if self.serves_decode_only and decode else None
        threshold = self._settings.local_prefill_tokens
        if not threshold:
            return None
        demand = request.demand
        cached = [engine.load.num_cached_tokens(demand) for engine in decode]
        reason = local_prefill(demand.num_prompt_tokens, cached, threshold)
        demand.max_uncached_tokens = threshold if reason is LocalPrefill.CACHED_PROMPT else None
        return reason

    def note_decode_only(self, model: str, is_on: bool) -> None:
        """Logs a change, once."""
        if self._decode_only.get(model, False) == is_on or not self.serves_decode_only:
            return
        self._decode_only[model] = is_on
        if is_on:
            logger.warning("no prefill engine is up for %s: decode engines serve alone and prefill themselves", model)
        else:
            logger.warning("a prefill engine is up for %s again: prompts are prefilled there", model)

    def _candidates(self, role: Role, engines: Sequence[Engine], demand: Demand) -> list[Candidate]:
        candidates = []
        for position, engine in enumerate(engines):
            load = engine.load
            candidates.append(
                Candidate(
                    position,
                    engine.endpoint.url,
                    engine.num_outstanding,
                    load.num_tokens,
                    engine.num_chosen,
                    load.num_cached_tokens(demand) if role in self.roles_with_prefixes else 0,
                    None if load.kv.rooms is None else tuple(load.kv.rooms),
                )
            )
        return candidates


def _cached_enough(candidates: Sequence[Candidate], demand: Demand) -> Sequence[Candidate]:
    """For a request that skips the remote prefill because of a cache: the engines that have one."""
    if demand.max_uncached_tokens is None:
        return candidates
    uncached = demand.num_prompt_tokens - demand.max_uncached_tokens
    return [c for c in candidates if c.num_cached_tokens >= uncached] or candidates
