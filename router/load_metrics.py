"""Gauges of what engines are chosen by: tokens outstanding, KV cache of each rank, and the settings that decide."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.types import Role

if TYPE_CHECKING:
    from router.engines import EnginePool
    from router.settings import RouterSettings


class LoadCollector(Collector):
    """Read from the pool at each scrape."""

    def __init__(self, pool: EnginePool, settings: RouterSettings) -> None:
        self._pool = pool
        self._settings = settings

    def collect(self) -> Iterable[Metric]:
        threshold = GaugeMetricFamily(
            "tknp_local_prefill_threshold_tokens",
            "Uncached prompt tokens up to which a decode engine prefills by itself; 0 for never.",
        )
        threshold.add_metric([], self._settings.local_prefill_tokens)
        alone = GaugeMetricFamily(
            "tknp_models_without_prefill_engine", "Models that decode engines serve alone, no prefill engine being up."
        )
        alone.add_metric([], len(self._pool.degraded()))
        outstanding = GaugeMetricFamily(
            "tknp_engine_outstanding_tokens",
            "Tokens that the engine has from this router: prompts, and on decode engines output budgets.",
            labels=["role", "engine"],
        )
        for engine in self._pool.engines:
            outstanding.add_metric([engine.endpoint.role, engine.endpoint.name], engine.load.num_tokens)
        yield from (threshold, alone, outstanding, *self._of_ranks())

    def _of_ranks(self) -> Iterable[Metric]:
        labels = ["engine", "rank"]
        blocks = GaugeMetricFamily("tknp_engine_kv_blocks", "KV blocks of a decode engine's rank.", labels=labels)
        free = GaugeMetricFamily(
            "tknp_engine_kv_blocks_free", "Of those, free when the engine was last asked.", labels=labels
        )
        room = GaugeMetricFamily(
            "tknp_engine_kv_room_tokens",
            "Tokens that a rank has to spare if every request grows to its end; below 0 if it can't hold them.",
            labels=labels,
        )
        for engine in self._pool.of(Role.DECODE):
            kv = engine.load.kv
            for rank, tokens in zip(kv.ranks, kv.rooms or (), strict=False):  # the loop may forget them meanwhile
                of = [engine.endpoint.name, str(rank.rank)]
                blocks.add_metric(of, rank.num_blocks)
                free.add_metric(of, rank.num_free_blocks)
                room.add_metric(of, tokens)
        return blocks, free, room
