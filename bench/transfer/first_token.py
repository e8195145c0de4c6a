"""The same between real engines: how much later the first token comes than a decode step alone would bring it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.shapes import SHAPES
from bench.transfer.compare import BeyondLinkError, Plan
from bench.transfer.engine import EngineJob, serve
from bench.transfer.process import Served, ready


@dataclass(frozen=True)
class FirstTokenRow:
    """One path and case; medians.

    Attributes:
        first_token_ms: from handing the decode engine the requests to the last of their first tokens, beyond a bare
            decode step.
        beyond_resident_ms: the same beyond the first token of the same requests when their KV cache is there already,
            so that what vLLM does with a long prompt in any case is left out.
        first_ms: the same of the first request between the two engines.
        handover_ms: `first_token_ms` less what the bytes take on the link at its nominal rate.
        equal_tokens: share of first tokens that are the ones the prefill engine computed itself, with another kernel;
            random weights leave many near ties.
    """

    path: str
    tokens: int
    requests: int
    block_size: int
    first_token_ms: float
    least_first_token_ms: float
    most_first_token_ms: float
    beyond_resident_ms: float
    gigabytes_per_second: float
    handover_ms: float
    bare_step_ms: float
    prefill_ms: float
    first_ms: float
    hidden_share: float
    equal_tokens: float
    repeats: int


@dataclass(frozen=True)
class _Engines:
    path: str
    prefill: Served
    decode: Served


OFFER = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def compare_first_tokens(plan: Plan, say: Callable[[str], None]) -> Iterator[FirstTokenRow]:
    """All paths' engines at once on the same two GPUs, taking turns.

    Raises:
        BeyondLinkError: a result that can't be true.
        RuntimeError: an engine failed or did not answer in time.
    """
    assert plan.devices is not None
    pairs = []
    for number, path in enumerate(plan.paths):
        sides = []
        for side, role in enumerate(("kv_producer", "kv_consumer")):
            job = EngineJob(
                path,
                role,
                plan.shape,
                plan.block_size,
                max(tokens for _, tokens in plan.cases) + plan.block_size,
                plan.devices[side],
                15800 + 10 * number + side,
            )
            sides.append(Served(f"{path} {role} engine", serve, job))
        pairs.append(_Engines(path, *sides))
    with ready(*(side for pair in pairs for side in (pair.prefill, pair.decode))):
        first = {pair.path: _warm_up(pair) for pair in pairs}
        say("; ".join(f"{path}: first request {seconds * 1e3:.1f} ms" for path, seconds in first.items()))
        for requests, tokens in plan.cases:
            for row in _measure(plan, pairs, requests, tokens, first):
                say(str(row))
                yield row


def _warm_up(pair: _Engines) -> float:
    """Seconds of the first request beyond a bare step, after kernels are compiled on both sides."""
    for seed in (97, 98):
        pair.prefill.ask("generate", 1, 1024, seed, None)
        pair.decode.ask("generate", 1, 64, seed, None)
    return _hand_over(pair, 1, 1024, 99).seconds - _bare_step(pair, 99)


def _bare_step(pair: _Engines, seed: int) -> float:
    seconds: float = statistics.median(pair.decode.ask("generate", 1, 64, 900 + seed + i, None)[0] for i in range(3))
    return seconds


@dataclass(frozen=True)
class _HandOver:
    """Seconds of the decode leg, of the prefill leg, and of the decode leg once more, when nothing is to be pulled;
    share of first tokens that both engines computed alike."""

    seconds: float
    prefill_seconds: float
    resident_seconds: float
    equal: float


def _hand_over(pair: _Engines, requests: int, tokens: int, seed: int) -> _HandOver:
    prefill_seconds, prefilled = pair.prefill.ask("generate", requests, tokens, seed, [OFFER] * requests)
    seconds, decoded = pair.decode.ask("generate", requests, tokens, seed, [offer for _, offer in prefilled])
    resident_seconds, _ = pair.decode.ask("generate", requests, tokens, seed, None)
    equal = [a == b for (a, _), (b, _) in zip(prefilled, decoded, strict=True)]
    return _HandOver(seconds, prefill_seconds, resident_seconds, statistics.fmean(equal))


def _measure(
    plan: Plan, pairs: Sequence[_Engines], requests: int, tokens: int, first: dict[str, float]
) -> Iterator[FirstTokenRow]:
    size = requests * tokens * SHAPES[plan.shape].kv_bytes_per_token
    runs: dict[str, list[_HandOver]] = {pair.path: [] for pair in pairs}
    bare_steps: dict[str, list[float]] = {pair.path: [] for pair in pairs}
    for seed in range(plan.repeats + 1):
        for pair in pairs:
            runs[pair.path].append(_hand_over(pair, requests, tokens, seed))
            bare_steps[pair.path].append(_bare_step(pair, 10 * seed))
    for pair in pairs:
        measured = runs[pair.path][1:]
        bare = statistics.median(bare_steps[pair.path])
        beyond = [run.seconds - bare for run in measured]
        median = statistics.median(beyond)
        if plan.link is not None and size / median > plan.link:
            raise BeyondLinkError(
                f"{pair.path}, {requests} x {tokens} tokens: {size / median / 1e9:.0f} GB/s, but the link gives "
                f"{plan.link / 1e9:.0f}"
            )
        if not all(run.equal for run in runs[pair.path]):
            raise RuntimeError(
                f"{pair.path}, {requests} x {tokens} tokens: other first tokens than the prefill engine's"
            )
        yield FirstTokenRow(
            path=pair.path,
            tokens=tokens,
            requests=requests,
            block_size=plan.block_size,
            first_token_ms=round(median * 1e3, 3),
            least_first_token_ms=round(min(beyond) * 1e3, 3),
            most_first_token_ms=round(max(beyond) * 1e3, 3),
            beyond_resident_ms=round(
                statistics.median(run.seconds - run.resident_seconds for run in measured) * 1e3, 3
            ),
            gigabytes_per_second=round(size / median / 1e9, 1),
            handover_ms=round((median - size / plan.link if plan.link else median) * 1e3, 3),
            bare_step_ms=round(bare * 1e3, 3),
            prefill_ms=round(statistics.median(run.prefill_seconds for run in measured) * 1e3, 1),
            first_ms=round(first[pair.path] * 1e3, 1),
            hidden_share=0.0,
            equal_tokens=round(statistics.fmean(run.equal for run in runs[pair.path]), 3),
            repeats=len(measured),
        )


def first_token_table(rows: Sequence[FirstTokenRow]) -> str:
    """For people."""
    lines = [f"{'path':10} {'requests':>8} {'tokens':>7} {'first token ms':>15} {'hand-over ms':>13} {'GB/s':>7}"]
    lines += [
        f"{r.path:10} {r.requests:8} {r.tokens:7} {r.first_token_ms:15.2f} {r.handover_ms:13.2f} "
        f"{r.gigabytes_per_second:7.1f}"
        for r in rows
    ]
    return "\n".join(lines)
