"""One load on one router: a number of streams at once, for as long as it takes; what it cost and what clients saw."""

from __future__ import annotations

import asyncio
import gc
import math
import os
import statistics
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import orjson

from bench.router.client import Samples, StreamClient
from bench.router.engine import MODEL
from bench.router.peers import Mode
from bench.router.process import API_KEY, busy_seconds, cpu_seconds, rss_bytes

if TYPE_CHECKING:
    from bench.router.engine import FakeEngine
    from bench.router.process import RouterProcess

_PROMPT = "The quick brown fox jumps over the lazy dog. " * 12  # about 128 tokens
HANG_SECONDS = 60.0
"""What is not over this long after its time counts as hung."""
SAMPLE_SECONDS = 0.2
SPARE_SECONDS = 30.0
"""What a load may take beyond its time; what runs then is cut off, and counts as an error."""


Sample = tuple[float, int]
"""Seconds since a load's begin, and bytes of resident memory."""


@dataclass(frozen=True)
class Load:
    """`period` 0: every stream as fast as it goes, one after the other, for `seconds`. Otherwise a stream begins every
    `period` seconds on each connection, and its events are spread evenly over the period; the connections begin one
    after the other, within `ramp` seconds (None: within a period). Without events answers are whole, not streams."""

    name: str
    concurrency: int
    num_events: int
    seconds: float
    period: float = 0.0
    ramp: float | None = None

    @property
    def interval(self) -> float:
        """Seconds between two events of a stream."""
        return self.period / self.num_events if self.period else 0.0

    @property
    def limit(self) -> float:
        """Seconds after which the load is over, done or not."""
        return self.seconds + 2 * self.period + SPARE_SECONDS

    @property
    def num_rounds(self) -> int:
        """Streams of each connection, where they are paced."""
        return max(1, math.ceil(self.seconds / self.period))


@dataclass(frozen=True)
class Result:
    """Times in microseconds, CPU in seconds, memory in MiB; `foreign_cpu` is the share of the two cores that others
    used, `load_cpu` the share of its core that client and engine used."""

    router: str
    mode: str
    load: str
    concurrency: int
    num_events_per_stream: int
    period: float  # s
    seconds: float
    num_requests: int
    num_events: int
    events_per_read: float
    requests_per_second: float
    router_cpu_seconds: float | None
    first_token_p50_us: float | None
    first_token_p99_us: float | None
    delivery_p50_us: float | None
    delivery_p99_us: float | None
    rss_before_mib: float | None
    rss_peak_mib: float | None
    rss_after_mib: float | None
    num_errors: int
    errors: dict[str, int]
    died: bool
    rss_line_mib: list[list[float]]  # one sample a second, each with the seconds since the load's begin
    foreign_cpu: float
    load_cpu: float
    turn: int | None = None  # when the turn began to which it belongs, in seconds since 1970; None without turns


def request_body(mode: Mode, num_events: int) -> bytes:
    """For a stream of so many events; for a whole answer without any."""
    tokens = {"max_tokens": max(1, num_events), "stream": num_events > 0}
    body = {"model": MODEL, "prompt": _PROMPT, **tokens, "temperature": 0}
    if mode is Mode.ONE_LEG:
        # Our router sends such a request to a decode engine alone. Every router gets the same bytes.
        body["best_of"] = 2
    return orjson.dumps(body)


def request_bytes(mode: Mode, num_events: int) -> bytes:
    body = request_body(mode, num_events)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    head += b"Authorization: Bearer %b\r\n" % API_KEY.encode()
    return b"%bContent-Length: %d\r\n\r\n%b" % (head, len(body), body)


async def run_load(
    load: Load,
    mode: Mode,
    engines: tuple[FakeEngine, FakeEngine],
    port: int,
    cores: Sequence[int],
    router: RouterProcess | None = None,
) -> Result:
    """Runs one load to its end.

    Args:
        engines: prefill and decode.
        cores: those that count for `foreign_cpu`; this process and the router run nowhere else.
        router: None for a client that goes straight to the decode engine.
    """
    prefill, decode = engines
    decode.interval = load.interval
    prefill.num_generations = decode.num_generations = 0
    samples = Samples()
    sampler = asyncio.create_task(_sample_memory(router)) if router else None
    gc.collect()
    gc.freeze()
    busy, own, spent = busy_seconds(cores), time.process_time(), cpu_seconds(router.pid) if router else 0.0
    rss = rss_bytes(router.pid) / 2**20 if router else None
    begin = time.monotonic()
    await _run_clients(load, request_bytes(mode, load.num_events), port, samples)
    seconds = time.monotonic() - begin
    own = time.process_time() - own
    died = router is not None and not router.is_alive
    router_cpu = cpu_seconds(router.pid) - spent if router and not died else 0.0
    busy = busy_seconds(cores) - busy
    line = await _stopped(sampler) if sampler else []
    peak = max((rss for _, rss in line), default=None)
    _check_legs(router, mode, engines, samples)
    return Result(
        router=router.name if router else "direct",
        mode=mode,
        load=load.name,
        concurrency=load.concurrency,
        num_events_per_stream=load.num_events,
        period=load.period,
        seconds=round(seconds, 3),
        num_requests=samples.num_requests,
        num_events=samples.num_events,
        events_per_read=round(samples.num_events / max(1, samples.num_reads), 3),
        requests_per_second=round(samples.num_requests / seconds, 1),
        router_cpu_seconds=round(router_cpu, 3) if router else None,
        first_token_p50_us=_microseconds(samples.first_token, 50),
        first_token_p99_us=_microseconds(samples.first_token, 99),
        delivery_p50_us=_microseconds(samples.delivery, 50),
        delivery_p99_us=_microseconds(samples.delivery, 99),
        rss_before_mib=rss and round(rss, 1),
        rss_peak_mib=peak and round(peak / 2**20, 1),
        rss_after_mib=round(rss_bytes(router.pid) / 2**20, 1) if router and not died else None,
        num_errors=sum(samples.errors.values()),
        errors=samples.errors,
        died=died,
        rss_line_mib=[[round(at, 1), round(rss / 2**20, 1)] for at, rss in _each_second(line)],
        foreign_cpu=round(max(0.0, busy - own - router_cpu) / (len(cores) * seconds), 3),
        load_cpu=round(own / seconds, 3),
    )


class WrongModeError(RuntimeError):
    """A router sent requests another way than the mode says: its figures would be compared with something else."""


def _check_legs(
    router: RouterProcess | None, mode: Mode, engines: tuple[FakeEngine, FakeEngine], samples: Samples
) -> None:
    prefill, decode = engines
    wanted = decode.num_generations if mode is Mode.TWO_LEG and router else 0
    # Requests that failed may have had one leg only; health checks that generate add a few.
    slack = sum(samples.errors.values()) + 0.02 * decode.num_generations + 5 * len(prefill.ports)
    if abs(prefill.num_generations - wanted) > slack:
        raise WrongModeError(
            f"{router.name if router else 'the client'} was to run {mode}, but sent {prefill.num_generations} requests "
            f"to the prefill engine and {decode.num_generations} to the decode engine"
        )


async def _run_clients(load: Load, request: bytes, port: int, samples: Samples) -> None:
    loop = asyncio.get_running_loop()
    begin = loop.time()
    ramp = load.period if load.ramp is None else load.ramp

    async def connect() -> StreamClient:
        _, client = await loop.create_connection(lambda: StreamClient(samples), "127.0.0.1", port)
        return client

    async def run(number: int) -> None:
        client: StreamClient | None = None
        for turn in range(load.num_rounds) if load.period else iter(int, 1):
            if load.period:
                due = begin + turn * load.period + number / load.concurrency * ramp
                await asyncio.sleep(max(0.0, due - loop.time()))
            elif loop.time() - begin >= load.seconds:
                break
            try:
                if client is None or not client.is_open:
                    client = await connect()
                async with asyncio.timeout(HANG_SECONDS + load.period):
                    await client.ask(request, load.num_events)
            except TimeoutError:
                samples.failed("hung")
                client = None
            except OSError as error:
                samples.failed(type(error).__name__)
                await asyncio.sleep(0.1)
        if client is not None:
            client.close()

    runs = [asyncio.create_task(run(number)) for number in range(load.concurrency)]
    _, late = await asyncio.wait(runs, timeout=load.limit)
    for late_run in late:
        samples.failed("cut off")
        late_run.cancel()
    await asyncio.gather(*runs, return_exceptions=bool(late))


async def _sample_memory(router: RouterProcess) -> list[Sample]:
    """The resident memory in bytes, every SAMPLE_SECONDS until this task is cancelled."""
    seen: list[Sample] = []
    begin = time.monotonic()
    try:
        while router.is_alive:
            seen.append((time.monotonic() - begin, rss_bytes(router.pid)))
            await asyncio.sleep(SAMPLE_SECONDS)
    except asyncio.CancelledError:
        pass
    return seen


def _each_second(line: Sequence[Sample]) -> list[Sample]:
    """The first sample of each second."""
    return [
        sample for before, sample in zip([(-1.0, 0), *line], line, strict=False) if int(before[0]) != int(sample[0])
    ]


async def _stopped(sampler: asyncio.Task[list[Sample]]) -> list[Sample]:
    sampler.cancel()
    return await sampler


def _microseconds(values: array[int], percentile: int) -> float | None:
    if len(values) < 2:
        return round(values[0] / 1e3, 1) if values else None
    return round(statistics.quantiles(values, n=100, method="inclusive")[percentile - 1] / 1e3, 1)


def pin(core: int) -> None:
    """This process, client and engine, to one core."""
    os.sched_setaffinity(0, {core})
