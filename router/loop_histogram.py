"""A histogram for what is observed at every chunk of every stream, and at every request's end."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


class LoopHistogram(Collector):
    """As prometheus_client's Histogram, and without its locks: one thread alone may observe."""

    def __init__(
        self,
        name: str,
        documentation: str,
        buckets: Sequence[float],
        label: str | None = None,
        values: Sequence[str] = (),
    ) -> None:
        """`buckets` are upper bounds, ascending; `values` are all that the label ever has."""
        self._name = name
        self._documentation = documentation
        self._labels = None if label is None else [label]
        self._bounds = list(buckets)
        self._series = {value: Series(self._bounds) for value in (values if label is not None else ("",))}

    def series(self, value: str = "") -> Series:
        """The one of that label value; the only one, if there is no label."""
        return self._series[value]

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labels)
        names = [*map(str, map(float, self._bounds)), "+Inf"]
        for value, series in self._series.items():
            buckets = list(zip(names, accumulate(series.counts), strict=True))
            family.add_metric([] if self._labels is None else [value], buckets, series.sum)
        yield family


class Series:
    def __init__(self, bounds: list[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self._bounds, value)] += 1
        self.sum += value
