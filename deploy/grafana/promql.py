"""Pieces of PromQL. Every selector is for the chosen namespaces; names and labels are explained in docs/metrics.md."""

from __future__ import annotations

NAMESPACE = 'namespace=~"$namespace"'
ENGINE = 'instance=~"$engine"'
PREFILL, DECODE, ROUTER = (f'component="{name}"' for name in ("prefill", "decode", "router"))


def series(metric: str, *matchers: str) -> str:
    return f"{metric}{{{', '.join((NAMESPACE, *matchers))}}}"


def rate(metric: str, *matchers: str) -> str:
    return f"rate({series(metric, *matchers)}[$__rate_interval])"


def total(expression: str, *by: str) -> str:
    """The sum, by labels if there are any."""
    return f"sum by ({', '.join(by)}) ({expression})" if by else f"sum({expression})"


def quantile(share: float, histogram: str, *matchers: str, by: tuple[str, ...] = ()) -> str:
    buckets = total(rate(f"{histogram}_bucket", *matchers), *by, "le")
    return f"histogram_quantile({share}, {buckets})"


def mean(histogram: str, *matchers: str, by: tuple[str, ...] = ()) -> str:
    sums, counts = (total(rate(f"{histogram}_{part}", *matchers), *by) for part in ("sum", "count"))
    return f"{sums} / {counts}"
