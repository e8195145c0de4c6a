"""The controller of --flip-roles: moves engines that can do both between the pools when their load drifts apart."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge

from router.balance import History, Patience, PoolLoad, decide
from router.fit import misfit
from router.kv_roles import kv_roles
from router.types import Role

if TYPE_CHECKING:
    import aiohttp

    from router.engines import Engine, EnginePool
    from router.membership import Membership
    from router.settings import RouterSettings

logger = logging.getLogger(__name__)

LOOK_INTERVAL = 1.0  # s between two looks at the pools' loads


class RoleFlips:
    def __init__(
        self,
        pool: EnginePool,
        membership: Membership,
        session: aiohttp.ClientSession,
        settings: RouterSettings,
        registry: CollectorRegistry,
    ) -> None:
        self._pool = pool
        self._membership = membership
        self._session = session
        self._settings = settings
        self._patience = Patience(settings.flip_hold, settings.flip_cooldown)
        self._history = History()
        flips = Counter(
            "tknp_role_flips", "Engines that were given the other role, by the new one.", ["role"], registry=registry
        )
        self._flips = {role: flips.labels(role) for role in Role}
        pressure = Gauge(
            "tknp_pool_pressure",
            "What a pool has to do as a share of what it should have at most; only with --flip-roles.",
            ["role"],
            registry=registry,
        )
        self._pressure = {role: pressure.labels(role) for role in Role}

    async def run(self) -> None:
        """Never ends, unless flips are off."""
        while self._settings.flip_roles:
            await asyncio.sleep(LOOK_INTERVAL)
            loads = {role: self._load(role) for role in Role}
            for role, load in loads.items():
                self._pressure[role].set(float("nan") if load.pressure is None else load.pressure)
            if not self._membership.is_settled():  # one at a time: what a flip changes must be seen first
                continue
            now = asyncio.get_running_loop().time()
            prefill, decode = loads[Role.PREFILL], loads[Role.DECODE]
            needed, self._history = decide(now, prefill, decode, self._history, self._patience)
            if needed is not None:
                await self._flip_one(needed)

    def _load(self, role: Role) -> PoolLoad:
        engines = self._taking(role)
        if not engines:
            return PoolLoad(0, None)
        if role is Role.PREFILL:
            tokens = sum(engine.load.num_tokens for engine in engines)
            return PoolLoad(len(engines), tokens / (len(engines) * self._settings.flip_prefill_tokens))
        kvs = [engine.load.kv for engine in engines if engine.load.kv.rooms is not None]
        capacity = sum(rank.num_blocks * rank.block_size for kv in kvs for rank in kv.ranks)
        if not capacity:
            return PoolLoad(len(engines), None)
        taken = 1 - sum(sum(kv.rooms or ()) for kv in kvs) / capacity
        return PoolLoad(len(engines), max(0.0, taken) / self._settings.flip_decode_kv)

    def _taking(self, role: Role) -> list[Engine]:
        return [engine for engine in self._pool.of(role) if engine.is_up and not engine.is_draining]

    async def _flip_one(self, role: Role) -> None:
        """The least busy engine that can take the role, and without which its pool still serves every model."""
        givers = self._taking(role.other)
        for engine in sorted(givers, key=lambda engine: engine.load.num_tokens):
            others = [other for other in givers if other is not engine]
            if not self._is_spare(engine, others) or role not in (await kv_roles(self._session, engine) or ()):
                continue
            # While it was asked, the pool may have lost others, or this one.
            left = self._taking(role.other)
            if engine not in left or not self._is_spare(engine, [other for other in left if other is not engine]):
                continue
            logger.info("%s engine %s is to be %s: the pools' loads differ", role.other, engine.endpoint.name, role)
            self._membership.flip(engine)
            self._flips[role].inc()
            return
        logger.warning(
            "the %s pool has too much to do, but no %s engine can change its role: either it was not started with "
            "--kv-both, or it is the only one of its model",
            role,
            role.other,
        )

    def _is_spare(self, engine: Engine, others: list[Engine]) -> bool:
        """Whether its pool serves all of its models without it, and it fits to what stays there."""
        if not all(any(model in other.models for other in others) for model in engine.models):
            return False
        if engine.endpoint.role is Role.PREFILL:
            return any(misfit(other, engine) is None for other in others)
        return any(misfit(engine, other) is None for other in others)
