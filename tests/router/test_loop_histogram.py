from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from router.loop_histogram import LoopHistogram

BUCKETS = (0.5, 1, 2.5)
SEEN = (0.0, 0.5, 0.7, 1.0, 2.6, 100.0)


def exposed(registry: CollectorRegistry) -> list[str]:
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


@pytest.mark.parametrize("values", [(), ("one", "two")])
def test_it_is_exposed_as_the_client_librarys(values: tuple[str, ...]) -> None:
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    histogram = Histogram("seconds", "Some.", ["kind"] if values else [], buckets=BUCKETS, registry=theirs)
    loop_histogram = LoopHistogram("seconds", "Some.", BUCKETS, "kind" if values else None, values)
    ours.register(loop_histogram)
    for num, value in enumerate(values or ("",), 1):
        child = histogram.labels(value) if values else histogram
        for seconds in num * SEEN:
            child.observe(seconds)
            loop_histogram.series(value).observe(seconds)
    assert exposed(ours) == exposed(theirs)
    assert len(exposed(ours)) == 2 + max(1, len(values)) * (len(BUCKETS) + 3)
