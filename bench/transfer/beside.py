"""What a hand-over costs those whom the decode engine answers meanwhile: their time between tokens while a prompt's KV
cache comes, all at once or streamed. Real engines with random weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.transfer.compare import Plan
from bench.transfer.engine import STREAMED_TOKENS, EngineJob, Watched, serve
from bench.transfer.first_token import OFFER, introduce, stream_params
from bench.transfer.process import Served, ready

STREAM_TOKENS = 2048
"""Prompts of those that are answered meanwhile."""

_LEAD_SECONDS, _REST_SECONDS = 0.3, 0.3
"""Before the prompt that is handed over comes, and after its first token."""

WAYS = ("nothing", "elsewhere", "afterwards", "streamed")


@dataclass(frozen=True)
class BesideRow:
    """One path, case and way; of all repeats together.

    Attributes:
        way: "nothing" is handed over; "elsewhere": nothing, but the prefill engine, on the same host, computes the
            prompt; "afterwards", when the prefill engine has answered; "streamed".
        streams: requests that are answered meanwhile.
        bare_itl_ms: their time between tokens just before and after, the mean of both medians; it grows with them.
        itl_ms, itl_p99_ms, most_itl_ms: the same from when the decode engine has the prompt to its first token; median,
            99th percentile and longest.
        lost_ms: how much later than with `bare_itl_ms` a stream's next token comes after one hand-over; median, least
            and most.
        shared_ms: from when the decode engine has the prompt to its first token; median.
        streamed_chunk: tokens that the prefill engine computes in a step.
    """

    path: str
    way: str
    tokens: int
    requests: int
    streams: int
    bare_itl_ms: float
    itl_ms: float
    itl_p99_ms: float
    most_itl_ms: float
    lost_ms: float
    least_lost_ms: float
    most_lost_ms: float
    shared_ms: float
    streamed_chunk: int
    repeats: int


def compare_beside(plan: Plan, streams: int, say: Callable[[str], None]) -> Iterator[BesideRow]:
    """One path after the other.

    Raises:
        RuntimeError: an engine failed, or did not answer in time.
        ValueError: vLLM's own connector is to stream.
    """
    assert plan.devices is not None
    if "stock" in plan.paths:
        raise ValueError("vLLM's own connector does not stream; give --path direct or another of ours")
    chunk = plan.streamed_chunk or 2048
    for number, path in enumerate(plan.paths):
        longest = max(tokens for _, tokens in plan.cases)
        job = EngineJob(
            path,
            "kv_producer",
            plan.shape,
            plan.block_size,
            max(longest, STREAM_TOKENS + STREAMED_TOKENS) + plan.block_size,
            plan.devices[0],
            16000 + 20 * number,
            step_tokens=chunk,
        )
        other = {"role": "kv_consumer", "device": plan.devices[1], "port": job.port + 1, "step_tokens": 16_384}
        prefill = Served(f"{path} prefill engine", serve, job)
        decode = Served(f"{path} decode engine", serve, EngineJob(**{**vars(job), **other}))
        with ready(prefill, decode):
            introduce(decode, prefill)
            for requests, tokens in plan.cases:
                runs: dict[str, list[Watched]] = {way: [] for way in WAYS}
                for seed in range(plan.repeats + 1):
                    decode.ask("open_streams", streams, STREAM_TOKENS)
                    for way in WAYS:
                        runs[way].append(_watch(prefill, decode, way, requests, tokens, seed))
                for way in WAYS:
                    row = _row(path, way, requests, tokens, streams, chunk, runs[way][1:])
                    say(str(row))
                    yield row


def _watch(prefill: Served, decode: Served, way: str, requests: int, tokens: int, seed: int) -> Watched:
    ask = (requests, tokens, seed)
    window = (_LEAD_SECONDS, _REST_SECONDS)
    if way == "nothing":
        watched: Watched = decode.ask("watch", *window, *ask, None)
    elif way == "elsewhere":
        decode.tell("watch", *window, *ask, None)
        time.sleep(_LEAD_SECONDS)
        prefill.ask("generate", *ask, None)
        watched = decode.answer()
    elif way == "afterwards":
        _, prefilled, _ = prefill.ask("generate", *ask, [OFFER] * requests)
        watched = decode.ask("watch", *window, *ask, [offer for _, offer in prefilled])
    else:
        streams, ahead = stream_params(prefill, f"beside-{requests}-{tokens}-{seed}", requests)
        decode.tell("watch", *window, *ask, ahead)
        time.sleep(_LEAD_SECONDS)
        prefill.ask("generate", *ask, streams)
        watched = decode.answer()
    return watched


def _row(
    path: str, way: str, requests: int, tokens: int, streams: int, chunk: int, runs: Sequence[Watched]
) -> BesideRow:
    gaps = sorted(gap for run in runs for gap in run.during)
    bare = [(statistics.median(run.before) + statistics.median(run.after)) / 2 for run in runs]
    lost = [sum(run.during) - one * len(run.during) for run, one in zip(runs, bare, strict=True)]
    return BesideRow(
        path=path,
        way=way,
        tokens=tokens,
        requests=requests,
        streams=streams,
        bare_itl_ms=round(statistics.median(bare) * 1e3, 3),
        itl_ms=round(statistics.median(gaps) * 1e3, 3),
        itl_p99_ms=round(gaps[int(0.99 * (len(gaps) - 1))] * 1e3, 3),
        most_itl_ms=round(gaps[-1] * 1e3, 3),
        lost_ms=round(statistics.median(lost) * 1e3, 2),
        least_lost_ms=round(min(lost) * 1e3, 2),
        most_lost_ms=round(max(lost) * 1e3, 2),
        shared_ms=round(statistics.median(run.shared for run in runs) * 1e3, 1),
        streamed_chunk=chunk,
        repeats=len(runs),
    )


def beside_table(rows: Sequence[BesideRow]) -> str:
    """For people."""
    names = "bare ITL ms", "ITL ms", "p99", "most", "lost ms", "over ms"
    lines = [f"{'path':10} {'way':10} {'tokens':>7} {'streams':>8} " + " ".join(f"{name:>11}" for name in names)]
    for r in rows:
        figures = r.bare_itl_ms, r.itl_ms, r.itl_p99_ms, r.most_itl_ms, r.lost_ms, r.shared_ms
        head = f"{r.path:10} {r.way:10} {r.tokens:7} {r.streams:8} "
        lines.append(head + " ".join(f"{figure:11.2f}" for figure in figures))
    return "\n".join(lines)
