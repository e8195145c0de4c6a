"""KV from one engine to another: vLLM's own connector and ours, in one run."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.shapes import SHAPES
from bench.transfer.process import Served, ready
from bench.transfer.side import Pulled, SideJob, serve

NVLINK_BYTES_PER_SECOND = 450e9
"""One way between two H200s, by the datasheet; what is faster was not copied."""

CASES = ((1, 8192), (1, 32768), (8, 8192))
"""Requests and the tokens of each."""


class BeyondLinkError(RuntimeError):
    """A transfer was faster than the link: something was not copied."""


class WrongBlocksError(RuntimeError):
    """Blocks hold other bytes than the ones they should."""


@dataclass(frozen=True)
class Row:
    """One path and case; medians of `repeats` transfers.

    Attributes:
        path: stock is vLLM's NixlConnector; nixl and direct are ours.
        handover_ms: from the order to completion, beyond what the bytes take on the link at its nominal rate.
        hidden_share: part of the bytes that had arrived when the prompt was computed; none, without engines.
        first_ms: the first pull between the two engines, with the handshake; 0 tokens' worth of difference is left in.
    """

    path: str
    tokens: int
    requests: int
    fragmented: bool
    block_size: int
    gigabytes_per_second: float
    least_gigabytes_per_second: float
    most_gigabytes_per_second: float
    seconds: float
    handover_ms: float
    hidden_share: float
    repeats: int
    first_ms: float


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        devices: of the prefill and the decode side; None for the CPU.
        link: bytes per second; None to believe any result.
        streamed_chunk: of real engines, tokens that the prefill engine computes in a step; the decode engine then pulls
            what is there. None to pull afterwards.
        ahead: real engines, that do not stream: the decode engine has the request before prefill computes it.
        sources: real prefill engines, of which each has a first request; one of them is measured otherwise.
    """

    paths: tuple[str, ...] = ("stock", "direct")
    shape: str = "8b"
    block_size: int = 16
    cases: tuple[tuple[int, int], ...] = CASES
    devices: tuple[int, int] | None = (0, 1)
    repeats: int = 7
    link: float | None = NVLINK_BYTES_PER_SECOND
    streamed_chunk: int | None = None
    ahead: bool = False
    sources: int = 1

    @property
    def num_blocks(self) -> int:
        """Of each cache: twice what the largest case needs, to have something to be scattered in."""
        return 2 * max(requests * -(-tokens // self.block_size) for requests, tokens in self.cases) + 1


def compare(plan: Plan, say: Callable[[str], None]) -> Iterator[Row]:
    """Runs the paths one after the other, each with engines of its own on the same devices.

    Raises:
        BeyondLinkError, WrongBlocksError: a result that can't be true, or is no good.
        RuntimeError: a side failed or did not answer in time.
    """
    for number, path in enumerate(plan.paths):
        pair = _start(plan, path, 15600 + 100 * number)
        with ready(pair.prefill, pair.decode):
            yield from _measure(plan, path, pair, say)


@dataclass(frozen=True)
class Pair:
    """The two sides of a path, as processes."""

    prefill: Served
    decode: Served


def _start(plan: Plan, path: str, port: int) -> Pair:
    sides = []
    for number, role in enumerate(("kv_producer", "kv_consumer")):
        device = None if plan.devices is None else plan.devices[number]
        job = SideJob(path, role, plan.shape, plan.block_size, plan.num_blocks, device, port + number)
        sides.append(Served(f"{path} {role} side", serve, job))
    return Pair(*sides)


def _measure(plan: Plan, path: str, pair: Pair, say: Callable[[str], None]) -> Iterator[Row]:
    rng = random.Random(7)
    seeds = (11, 12)
    pair.prefill.ask("fill", seeds[0])
    started = time.perf_counter()
    first = _pull(plan, pair, rng, 1, min(tokens for _, tokens in plan.cases), True, seeds)
    say(f"{path}: the first pull took {first.seconds * 1e3:.1f} ms; checked in {time.perf_counter() - started:.1f} s")
    for requests, tokens in plan.cases:
        for fragmented in (False, True):
            checked = _pull(plan, pair, rng, requests, tokens, fragmented, seeds)
            if first.wrong_blocks or checked.wrong_blocks:
                raise WrongBlocksError(f"{path}: {checked.wrong_blocks} blocks hold other bytes than they should")
            seconds = [_pull(plan, pair, rng, requests, tokens, fragmented).seconds for _ in range(plan.repeats)]
            row = _row(plan, path, requests, tokens, fragmented, seconds, first.seconds)
            say(f"{path}: {row}")
            yield row


def _pull(
    plan: Plan,
    pair: Pair,
    rng: random.Random,
    requests: int,
    tokens: int,
    fragmented: bool,
    seeds: tuple[int, int] | None = None,
) -> Pulled:
    lists = [_blocks(plan, rng, requests, tokens, fragmented) for _ in range(2)]
    offers = pair.prefill.ask("offer", tokens, lists[0])
    pulled: Pulled = pair.decode.ask("pull", tokens, offers, lists[1], seeds)
    return pulled


def _blocks(plan: Plan, rng: random.Random, requests: int, tokens: int, fragmented: bool) -> list[list[int]]:
    """A fresh pool gives its blocks in order, a used one anyhow. Block 0 is vLLM's null block."""
    count = -(-tokens // plan.block_size)
    pool = list(range(1, plan.num_blocks))
    if fragmented:
        rng.shuffle(pool)
    return [pool[i * count : (i + 1) * count] for i in range(requests)]


def _row(
    plan: Plan, path: str, requests: int, tokens: int, fragmented: bool, seconds: Sequence[float], first: float
) -> Row:
    size = requests * tokens * SHAPES[plan.shape].kv_bytes_per_token
    rates = [size / s / 1e9 for s in seconds]
    if plan.link is not None and max(rates) * 1e9 > plan.link:
        raise BeyondLinkError(
            f"{path}, {requests} x {tokens} tokens: {max(rates):.0f} GB/s, but the link gives {plan.link / 1e9:.0f}"
        )
    median = statistics.median(seconds)
    return Row(
        path=path,
        tokens=tokens,
        requests=requests,
        fragmented=fragmented,
        block_size=plan.block_size,
        gigabytes_per_second=round(statistics.median(rates), 1),
        least_gigabytes_per_second=round(min(rates), 1),
        most_gigabytes_per_second=round(max(rates), 1),
        seconds=round(median, 6),
        handover_ms=round((median - (size / plan.link if plan.link else 0.0)) * 1e3, 3),
        hidden_share=0.0,
        repeats=len(seconds),
        first_ms=round(first * 1e3, 1),
    )


def table(rows: Sequence[Row]) -> str:
    """For people."""
    lines = [f"{'path':10} {'requests':>8} {'tokens':>7} {'pool':>8} {'GB/s':>7} {'least':>7} {'most':>7} {'ms':>8}"]
    lines += [
        f"{r.path:10} {r.requests:8} {r.tokens:7} {'used' if r.fragmented else 'fresh':>8} "
        f"{r.gigabytes_per_second:7.1f} {r.least_gigabytes_per_second:7.1f} {r.most_gigabytes_per_second:7.1f} "
        f"{r.seconds * 1e3:8.2f}"
        for r in rows
    ]
    return "\n".join(lines)
