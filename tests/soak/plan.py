"""What a soak consists of: engines, traffic, faults, and for how long."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SoakPlan:
    """Traffic goes on for `seconds`, or, where `num_requests` is given, for so many requests."""

    concurrency: int
    num_prefill: int
    token_parallel_sizes: tuple[int, ...]  # of each decode engine
    seconds: float = 0.0
    num_requests: int = 0
    faults_every: float = 0.0  # s from one fault to the next; 0 for none
    hang_ups: float = 0.0  # share of requests whose client goes away
    slow_clients: float = 0.0  # share of streams that are read slowly
    conversations: float = 0.0  # share of requests that go on with one; prefill engines pull back what was said
    stream_kv: bool = False  # whether decode engines pull while prompts are computed
    invalid: float = 0.08  # share of requests that must be refused
    request_timeout: float = 300.0  # s; what takes longer is lost
    settle_timeout: float = 90.0  # s after the last request until every block must be free; a lease is 30 s
    seed: int = 1


PRESETS = {
    # On the real stack, nothing breaks: every request that is not refused must be answered.
    "thousand": SoakPlan(concurrency=50, num_prefill=1, token_parallel_sizes=(4,), num_requests=1000),
    "hour": SoakPlan(
        concurrency=32,
        num_prefill=2,
        token_parallel_sizes=(2, 2),
        seconds=3600,
        faults_every=90,
        hang_ups=0.2,
        slow_clients=0.05,
        conversations=0.3,
    ),
    # For CI: the same, with one fault of each kind at most.
    "short": SoakPlan(
        concurrency=16,
        num_prefill=1,
        token_parallel_sizes=(2, 1),
        seconds=40,
        faults_every=18,
        hang_ups=0.25,
        slow_clients=0.08,
        conversations=0.25,
    ),
}
