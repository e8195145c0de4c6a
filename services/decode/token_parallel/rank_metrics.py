"""Prometheus metrics of the token-parallel ranks, on the decode engine's `/metrics`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prometheus_client import Gauge


def efficiency_between(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> float | None:
    """token_parallel_efficiency over the time between two polls, 0 to 1; None if no step ended in it.

    Sum over ranks of (seconds in steps - seconds waiting for other ranks), over (ranks x seconds of the root's
    steps): the share of the ranks' time in which they computed attention or the model. A rank without rows in a step
    counts as idle.
    """
    busy = sum(
        (a["step_seconds"] - a["wait_seconds"]) - (b["step_seconds"] - b["wait_seconds"])
        for b, a in zip(before, after, strict=True)
    )
    roots = [i for i, status in enumerate(after) if status["rank"] == 0]
    stepped = sum(after[i]["step_seconds"] - before[i]["step_seconds"] for i in roots) / len(roots)
    if stepped <= 0:
        return None
    return float(min(1.0, max(0.0, busy / (len(after) * stepped))))


class RankMetrics:
    """Gauges by rank; cumulative seconds are gauges too, because they are read, not counted, here."""

    def __init__(self) -> None:
        self._efficiency = Gauge(
            "token_parallel_efficiency",
            "Share of the token-parallel ranks' step time spent computing attention or the model, 0 to 1.",
        )
        self._by_rank = {
            key: Gauge(f"tknp_rank_{name}", text, ["rank"])
            for key, name, text in (
                ("num_blocks", "kv_blocks", "KV blocks of a token-parallel rank that requests can use."),
                (
                    "num_free_blocks",
                    "kv_blocks_free",
                    "Of those, free now; cached blocks in nobody's use count as free.",
                ),
                ("num_requests", "requests", "Requests that live on a token-parallel rank."),
                ("step_seconds", "step_seconds", "Seconds of steps that a rank took part in, since start."),
                ("wait_seconds", "wait_seconds", "Of those, seconds waiting for other ranks' rows, since start."),
                ("parameter_bytes", "parameter_bytes", "Bytes of model parameters on a rank."),
                ("kv_cache_bytes", "kv_cache_bytes", "Bytes allocated for KV cache on a rank."),
            )
        }

    def update(self, ranks: Sequence[dict[str, Any]], efficiency: float | None) -> None:
        """Takes over one poll of all workers; of a rank's tensor-parallel workers the last stands for the rank."""
        if efficiency is not None:
            self._efficiency.set(efficiency)
        for status in ranks:
            for key, gauge in self._by_rank.items():
                gauge.labels(str(status["rank"])).set(status[key])
