"""The next turn of a conversation, whose beginning a decode engine has: how much sooner a prefill engine is done that
pulls it than one that computes it (docs/kv-paths.md). Real engines with random weights."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.transfer.compare import Plan
from bench.transfer.engine import EngineJob, serve
from bench.transfer.first_token import OFFER, introduce
from bench.transfer.process import Served, ready


@dataclass(frozen=True)
class NextTurnRow:
    """One path and case; medians, ms.

    Attributes:
        tokens: that the decode engine has of each prompt.
        new_tokens: that come after them.
        keep_ms: the request by which the decode engine is asked to keep what it has.
        pulled_ms: the prefill engine's part, which pulls that and computes the rest.
        computed_ms: the same prompt by the same engine when it computes all of it.
        ratio: `computed_ms` over both other parts.
        equal_tokens: share of first tokens that are the same both ways; random weights leave many near ties.
    """

    path: str
    tokens: int
    new_tokens: int
    block_size: int
    keep_ms: float
    pulled_ms: float
    least_pulled_ms: float
    most_pulled_ms: float
    computed_ms: float
    ratio: float
    gigabytes_pulled: float
    equal_tokens: float
    repeats: int


@dataclass(frozen=True)
class _Turn:
    keep: float
    pulled: float
    computed: float
    num_bytes: float
    is_equal: bool


def compare_next_turns(plan: Plan, new_tokens: int, say: Callable[[str], None]) -> Iterator[NextTurnRow]:
    """One path after the other.

    Raises:
        RuntimeError: an engine failed, did not answer in time, or pulled nothing.
        ValueError: vLLM's own connector is to be compared, or a case has several requests.
    """
    assert plan.devices is not None
    if "stock" in plan.paths:
        raise ValueError("vLLM's own connector does not pull back; give --path direct or another of ours")
    if several := [f"{requests}x{tokens}" for requests, tokens in plan.cases if requests != 1]:
        raise ValueError(f"a turn is one request, but of {', '.join(several)} there are more; give --case 1x8192")
    for path in plan.paths:
        prefill, decode = (
            Served(
                f"{path} {side} engine",
                serve,
                EngineJob(
                    path,
                    "kv_both",
                    plan.shape,
                    plan.block_size,
                    max(tokens for _, tokens in plan.cases) + new_tokens + plan.block_size,
                    device,
                    15900 + number,
                    has_prefix_cache=side == "decode",
                ),
            )
            for number, (side, device) in enumerate(zip(("prefill", "decode"), plan.devices, strict=True))
        )
        with ready(prefill, decode):
            introduce(decode, prefill)
            introduce(prefill, decode)
            for _, tokens in plan.cases:
                # Kernels are compiled in the first.
                turns = [_turn(prefill, decode, tokens, new_tokens, seed) for seed in range(plan.repeats + 1)][1:]
                row = _row(plan, path, tokens, new_tokens, turns)
                say(str(row))
                yield row


def _turn(prefill: Served, decode: Served, tokens: int, new_tokens: int, seed: int) -> _Turn:
    decode.ask("generate", 1, tokens, seed, None)
    keep, [(_, kept)], _ = decode.ask("generate", 1, tokens + 1, seed, [OFFER])
    before, _ = prefill.ask("kv_bytes")
    pulled, [(token, offered)], _ = prefill.ask("generate", 1, tokens + new_tokens, seed, [{**kept, **_PREFILLS}])
    num_bytes = prefill.ask("kv_bytes")[0] - before
    if not num_bytes:
        raise RuntimeError(f"the prefill engine pulled nothing of {tokens} tokens; its output says why")
    # So its lease ends as it would, too.
    decode.ask("generate", 1, tokens + new_tokens, seed, [offered])
    computed, [(other, _)], _ = prefill.ask("generate", 1, tokens + new_tokens, seed, None)
    return _Turn(keep, pulled, computed, num_bytes, token == other)


_PREFILLS = {name: OFFER[name] for name in ("do_remote_decode", "do_remote_prefill")}


def _row(plan: Plan, path: str, tokens: int, new_tokens: int, turns: Sequence[_Turn]) -> NextTurnRow:
    keep, pulled, computed = (
        statistics.median(seconds) for seconds in zip(*((t.keep, t.pulled, t.computed) for t in turns), strict=True)
    )
    return NextTurnRow(
        path=path,
        tokens=tokens,
        new_tokens=new_tokens,
        block_size=plan.block_size,
        keep_ms=round(keep * 1e3, 2),
        pulled_ms=round(pulled * 1e3, 2),
        least_pulled_ms=round(min(turn.pulled for turn in turns) * 1e3, 2),
        most_pulled_ms=round(max(turn.pulled for turn in turns) * 1e3, 2),
        computed_ms=round(computed * 1e3, 2),
        ratio=round(computed / (keep + pulled), 2),
        gigabytes_pulled=round(statistics.median(turn.num_bytes for turn in turns) / 1e9, 3),
        equal_tokens=round(statistics.fmean(turn.is_equal for turn in turns), 3),
        repeats=len(turns),
    )


def next_turn_table(rows: Sequence[NextTurnRow]) -> str:
    """For people."""
    lines = [f"{'path':10} {'tokens':>7} {'new':>6} {'keep ms':>8} {'pulled ms':>10} {'computed ms':>12} {'ratio':>6}"]
    lines += [
        f"{r.path:10} {r.tokens:7} {r.new_tokens:6} {r.keep_ms:8.2f} {r.pulled_ms:10.2f} {r.computed_ms:12.2f} "
        f"{r.ratio:6.2f}"
        for r in rows
    ]
    return "\n".join(lines)
