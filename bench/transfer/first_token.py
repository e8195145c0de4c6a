"""The same between real engines: how much later the first token comes than a decode step alone would bring it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.shapes import SHAPES
from bench.transfer.compare import BeyondLinkError, Plan
from bench.transfer.engine import EngineJob, serve
from bench.transfer.process import Served, ready


@dataclass(frozen=True)
class FirstTokenRow:
    """One path and case; medians.

    Attributes:
        first_token_ms: from handing the decode engine the requests, or, where it had them before, from the prefill
            engine's answer, to the last of their first tokens, beyond a bare decode step.
        beyond_resident_ms: the same beyond the first token of requests of one token more when their KV cache is there
            already, so that what vLLM does with a long prompt in any case is left out; means nothing where the decode
            engine had the requests before, and has read their prompts.
        gigabytes_per_second: of the bytes that were not hidden.
        hidden_share: of the bytes pulled, those that had arrived when the decode engine heard of the prefill's end.
        first_ms: the same of the first request between the two engines, of 1,024 tokens, which are connected by then
            if the decode engine is ours; median of all prefill engines.
        later_ms: the same of those after it, of the same length.
        first_beyond_later_ms: how much longer it took than those, with each prefill engine.
        handover_ms: `first_token_ms` less what these bytes take on the link at its nominal rate.
        equal_tokens: share of first tokens that are the ones the prefill engine computed itself, with another kernel;
            random weights leave many near ties.
        streamed_chunk: tokens that the prefill engine computes in a step while KV cache streams; 0 if it does not.
        ahead: whether the decode engine had the requests before.
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
    later_ms: float
    first_beyond_later_ms: list[float]
    hidden_share: float
    equal_tokens: float
    repeats: int
    streamed_chunk: int
    ahead: bool


@dataclass(frozen=True)
class _Engines:
    path: str
    prefills: list[Served]
    decode: Served
    is_ahead: bool

    @property
    def prefill(self) -> Served:
        """The one that is measured."""
        return self.prefills[0]


@dataclass(frozen=True)
class _Run:
    """One hand-over: see FirstTokenRow; `seconds` with the decode step."""

    seconds: float
    prefill_seconds: float
    resident_seconds: float  # of the decode leg once more, when nothing is to be pulled
    equal_tokens: float
    hidden_share: float


_FIRST_REQUESTS, _FIRST_TOKENS = 8, 1024
_SHORT_TOKENS = 64
"""Full blocks, whatever the block size."""

_CONNECT_SECONDS = 5.0
"""In which engines that were told of one another have connected, in the background."""

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
        ValueError: vLLM's own connector is to pull before the prefill's end, or what streams not to stream.
    """
    assert plan.devices is not None
    if (plan.streamed_chunk or plan.ahead) and "stock" in plan.paths:
        raise ValueError(
            "vLLM's own connector pulls only after prefill; give --path direct or --path nixl with --streamed-chunk or "
            "--ahead"
        )
    if plan.streamed_chunk and plan.ahead:
        raise ValueError("--ahead is without streaming; give it or --streamed-chunk, not both")
    pairs = [_start(plan, path, 15800 + 20 * number) for number, path in enumerate(plan.paths)]
    with ready(*(side for pair in pairs for side in (*pair.prefills, pair.decode))):
        first = {pair.path: _first_requests(pair) for pair in pairs}
        for path, seconds in first.items():
            for one, later in seconds:
                say(f"{path}: first request {one * 1e3:.1f} ms, later ones {later * 1e3:.1f} ms")
        for requests, tokens in plan.cases:
            for row in _measure(plan, pairs, requests, tokens, first):
                say(str(row))
                yield row


def _start(plan: Plan, path: str, port: int) -> _Engines:
    assert plan.devices is not None
    job = EngineJob(
        path,
        "kv_producer",
        plan.shape,
        plan.block_size,
        max(tokens for _, tokens in plan.cases) + plan.block_size,
        plan.devices[0],
        port,
        step_tokens=plan.streamed_chunk or EngineJob.step_tokens,
        tells_layers=not plan.ahead,
    )
    # These have one request of theirs, and then some more.
    small = replace(job, max_model_len=2 * _FIRST_TOKENS, kv_cache_bytes=1 << 30)
    jobs = [job, *(replace(small, port=port + number) for number in range(1, plan.sources))]
    decode = replace(
        job,
        role="kv_consumer",
        device=plan.devices[1],
        port=port + len(jobs),
        has_prefix_cache=True,
        tells_layers=True,
    )
    return _Engines(
        path,
        [Served(f"{path} prefill engine {number}", serve, one) for number, one in enumerate(jobs)],
        Served(f"{path} decode engine", serve, decode),
        is_ahead=plan.ahead or plan.streamed_chunk is not None,
    )


def _first_requests(pair: _Engines) -> list[tuple[float, float]]:
    """With each prefill engine, seconds of the first request and of later ones beyond a bare step, after kernels are
    compiled on both sides."""
    for seed in (97, 98):
        for prefill in pair.prefills:
            prefill.ask("generate", 1, _FIRST_TOKENS, seed, None)
        pair.decode.ask("generate", 1, _SHORT_TOKENS, seed, None)
        # Decode steps too, which have attention kernels of their own.
        pair.decode.ask("generate", 1, _FIRST_TOKENS, seed, None, 4)
    if pair.path != "stock":
        introduce(pair.decode, *pair.prefills)
    bare = _bare_step(pair, 99)
    found = []
    for number, prefill in enumerate(pair.prefills):
        one = replace(pair, prefills=[prefill])
        seeds = range(99 + number * _FIRST_REQUESTS, 99 + (number + 1) * _FIRST_REQUESTS)
        first, *later = (_hand_over(one, 1, _FIRST_TOKENS, seed).seconds - bare for seed in seeds)
        found.append((first, statistics.median(later)))
    return found


def introduce(reader: Served, *sources: Served) -> None:
    """Has the one connect to the others ahead of the first request, as the router does."""
    for source in sources:
        reader.ask("meet", source.ask("peer"))
    time.sleep(_CONNECT_SECONDS)


def stream_params(prefill: Served, name: str, requests: int) -> tuple[list[Any], list[Any]]:
    """`kv_transfer_params` of both legs of so many requests, the decode legs of which are sent ahead."""
    names = [f"{name}-{i}" for i in range(requests)]
    where = {**prefill.ask("peer"), "do_remote_prefill": True, "do_remote_decode": False}
    offers = [{**OFFER, "tknp_lease_id": name, "tknp_stream": True} for name in names]
    return offers, [{**where, "tknp_stream": name} for name in names]


def _bare_step(pair: _Engines, seed: int) -> float:
    """Seconds of a request of which all but one token are here: a decode step, as that of one that was pulled."""
    seconds = []
    for i in range(3):
        pair.decode.ask("generate", 1, _SHORT_TOKENS, 900 + seed + i, None)
        seconds.append(pair.decode.ask("generate", 1, _SHORT_TOKENS + 1, 900 + seed + i, None)[0])
    return float(statistics.median(seconds))


def _hand_over(pair: _Engines, requests: int, tokens: int, seed: int) -> _Run:
    ask = ("generate", requests, tokens, seed)
    before = pair.decode.ask("kv_bytes")
    if pair.is_ahead:
        streams, ahead = stream_params(pair.prefill, f"{pair.path}-{requests}-{tokens}-{seed}", requests)
        pair.decode.tell(*ask, ahead)
        prefill_seconds, prefilled, prefill_end = pair.prefill.ask(*ask, streams)
        _, decoded, end = pair.decode.answer()
        seconds = end - prefill_end
    else:
        prefill_seconds, prefilled, _ = pair.prefill.ask(*ask, [OFFER] * requests)
        seconds, decoded, _ = pair.decode.ask(*ask, [offer for _, offer in prefilled])
    resident_seconds, _, _ = pair.decode.ask("generate", requests, tokens + 1, seed, None)
    num_bytes, hidden = (now - then for now, then in zip(pair.decode.ask("kv_bytes"), before, strict=True))
    equal = statistics.fmean(a == b for (a, _), (b, _) in zip(prefilled, decoded, strict=True))
    return _Run(seconds, prefill_seconds, resident_seconds, equal, hidden / num_bytes if num_bytes else 0.0)


def _measure(
    plan: Plan, pairs: Sequence[_Engines], requests: int, tokens: int, first: dict[str, list[tuple[float, float]]]
) -> Iterator[FirstTokenRow]:
    size = requests * tokens * SHAPES[plan.shape].kv_bytes_per_token
    runs: dict[str, list[_Run]] = {pair.path: [] for pair in pairs}
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
        hidden = statistics.median(run.hidden_share for run in measured)
        exposed = size * (1 - hidden)
        if not pair.is_ahead and plan.link is not None and size / median > plan.link:
            raise BeyondLinkError(
                f"{pair.path}, {requests} x {tokens} tokens: {size / median / 1e9:.0f} GB/s, but the link gives "
                f"{plan.link / 1e9:.0f}"
            )
        if not all(run.equal_tokens for run in runs[pair.path]):
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
            gigabytes_per_second=round(exposed / median / 1e9, 1) if median > 0 else 0.0,
            handover_ms=round((median - exposed / plan.link if plan.link else median) * 1e3, 3),
            bare_step_ms=round(bare * 1e3, 3),
            prefill_ms=round(statistics.median(run.prefill_seconds for run in measured) * 1e3, 1),
            first_ms=round(statistics.median(one for one, _ in first[pair.path]) * 1e3, 1),
            later_ms=round(statistics.median(later for _, later in first[pair.path]) * 1e3, 1),
            first_beyond_later_ms=[round((one - later) * 1e3, 1) for one, later in first[pair.path]],
            hidden_share=round(hidden, 4),
            equal_tokens=round(statistics.fmean(run.equal_tokens for run in runs[pair.path]), 3),
            repeats=len(measured),
            streamed_chunk=plan.streamed_chunk or 0,
            ahead=pair.is_ahead,
        )


def first_token_table(rows: Sequence[FirstTokenRow]) -> str:
    """For people."""
    lines = [
        f"{'path':10} {'requests':>8} {'tokens':>7} {'first token ms':>15} {'hand-over ms':>13} {'GB/s':>7} "
        f"{'hidden':>7}"
    ]
    lines += [
        f"{r.path:10} {r.requests:8} {r.tokens:7} {r.first_token_ms:15.2f} {r.handover_ms:13.2f} "
        f"{r.gigabytes_per_second:7.1f} {r.hidden_share:7.3f}"
        for r in rows
    ]
    return "\n".join(lines)
