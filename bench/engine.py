"""Measures one engine at a full context, without prefilling: `python -m bench.engine '<json of EngineJob>' out.jsonl`.

The KV cache is filled with noise when it is allocated (vLLM's DecodeBenchConnector), so that every step is a decode
step of the whole batch at the given context.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.breakdown import as_json, read, table
from bench.shapes import SHAPES

_WARM_UP_TOKENS, _TRACED_STEPS = 8, 12
_SETTLING_STEPS = 4
"""At the beginning of a batch, until the host has done with its requests, which came all at once."""


@dataclass(frozen=True)
class EngineJob:
    """One engine, several batch sizes and contexts.

    Attributes:
        variant: see `Setup.variant`.
        num_tokens: of each sequence, and so the steps of a batch.
        trace_dir: where each worker's Chrome trace of a few steps goes, of the batch and context with the most KV
            cache; none if empty.
    """

    shape: str
    contexts: tuple[int, ...]
    tensor_parallel_size: int
    token_parallel_size: int
    batches: tuple[int, ...]
    decode_context_parallel_size: int = 1
    variant: str = ""
    num_tokens: int = 128
    trace_dir: str = ""

    def as_argument(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of_argument(cls, argument: str) -> EngineJob:
        given = json.loads(argument)
        return cls(**{**given, "contexts": tuple(given["contexts"]), "batches": tuple(given["batches"])})


def main() -> None:
    job = EngineJob.of_argument(sys.argv[1])

    def write(result: dict[str, Any]) -> None:
        with Path(sys.argv[2]).open("a") as results:
            results.write(json.dumps(result) + "\n")

    began = time.perf_counter()
    llm = _start(job)
    write({"start": {"engine_seconds": round(time.perf_counter() - began, 1), **_kv_worker_seconds(llm, job)}})
    cells = []
    for context, batch in itertools.product(job.contexts, job.batches):
        if why := misfit(llm, job, context, batch):
            write({"left_out": why})
        else:
            cells.append((context, batch))
    for context, batch in cells:
        _intervals(llm, batch, context, _WARM_UP_TOKENS)
        # Seconds between steps in which every request got a token.
        write({"context": context, "batch": batch, "intervals": _intervals(llm, batch, context, job.num_tokens)})
    if job.trace_dir and cells:
        context, batch = max(cells, key=lambda cell: cell[0] * cell[1])
        num_micro_batches = _trace(llm, job, context, batch)
        if not num_micro_batches:
            write({"left_out": f"no trace, since too few steps had all of batch {batch} at {context} tokens"})
            return
        traces = enumerate(sorted(Path(job.trace_dir).iterdir()))
        ranks = [read(trace, rank, SHAPES[job.shape].num_layers, num_micro_batches) for rank, trace in traces]
        write({"breakdown": as_json(ranks)})
        print(table(ranks))


def misfit(llm: Any, job: EngineJob, context: int, batch: int) -> str | None:
    """Why a batch does not fit into the KV cache at once; None if it does."""
    config = llm.llm_engine.vllm_config
    # Of context-parallel workers each holds a share of every block. Ranks of one size get as many sequences each.
    block_size = config.cache_config.block_size * config.parallel_config.decode_context_parallel_size
    num_shares = job.token_parallel_size if job.variant == "spread" else 1
    room = (config.cache_config.num_gpu_blocks - job.token_parallel_size) // num_shares  # less each pool's null block
    wanted = -(-batch // num_shares) * -(-(context + job.num_tokens) // block_size)
    if wanted <= room:
        return None
    return f"at {context} tokens batch {batch} fills {wanted:,} blocks of {block_size} tokens where there are {room:,}"


def _kv_worker_seconds(llm: Any, job: EngineJob) -> dict[str, list[float]]:
    """From the start of each KV worker's process until it was ready, less what it waited for the root."""
    if job.token_parallel_size == 1:
        return {}
    ready = (worker.get("ready_seconds") for worker in llm.token_parallel_status())
    return {"kv_worker_seconds": [round(seconds, 1) for seconds in ready if seconds is not None]}


def _start(job: EngineJob) -> Any:
    from services.decode.token_parallel.llm import TokenParallelLLM

    return TokenParallelLLM(
        str(SHAPES[job.shape].write_config(Path(tempfile.mkdtemp()) / job.shape)),
        load_format="dummy",
        skip_tokenizer_init=True,
        tensor_parallel_size=job.tensor_parallel_size,
        decode_context_parallel_size=job.decode_context_parallel_size,
        worker_extension_cls="bench.dcp.ContextWorker" if job.decode_context_parallel_size > 1 else "",
        token_parallel_size=job.token_parallel_size,
        overlap_from=None if job.variant in ("", "spread") else 0,
        token_parallel_weights="spread" if job.variant == "spread" else "root",
        max_model_len=max(job.contexts) + 512,
        max_num_seqs=max(job.batches),
        max_num_batched_tokens=16_384,
        gpu_memory_utilization=0.9,
        # The sizes that are measured; to capture every other one takes longer than to measure.
        compilation_config={
            "cudagraph_capture_sizes": sorted({1, *job.batches}),
            **({"cudagraph_mode": "PIECEWISE"} if job.variant == "piecewise" else {}),
        },
        enable_prefix_caching=False,
        profiler_config={
            "profiler": "torch",
            "torch_profiler_dir": job.trace_dir,
            "torch_profiler_activities": ["CUDA"],
            "torch_profiler_with_stack": False,
            "torch_profiler_dump_cuda_time_total": False,
        }
        if job.trace_dir
        else None,
        kv_transfer_config={
            "kv_connector": "DecodeBenchConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"startup_fill": True},
        },
    )


def _trace(llm: Any, job: EngineJob, context: int, batch: int) -> int:
    """Runs the batch once more and has a few steps traced in which every request gets a token; returns the number of
    micro-batches in such a step, 0 if there were too few."""
    _add_requests(llm, batch, context, max(job.num_tokens, 4 * _TRACED_STEPS))
    full_steps, num_micro_batches = 0, 0
    while llm.llm_engine.has_unfinished_requests():
        if len(llm.llm_engine.step()) < batch:
            continue
        full_steps += 1
        if full_steps == _WARM_UP_TOKENS:
            llm.start_profile()
        elif full_steps == _WARM_UP_TOKENS + _TRACED_STEPS:
            llm.stop_profile()
            is_ours = job.token_parallel_size > 1
            num_micro_batches = llm.token_parallel_status()[0]["num_micro_batches"] if is_ours else 1
    return num_micro_batches


def _add_requests(llm: Any, batch: int, context: int, num_tokens: int) -> None:
    """All at once: the first would have ended before the last of many long prompts has been read."""
    from vllm import SamplingParams

    llm.sleep(level=0, mode="keep")
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    for number in range(batch):
        prompt = {"prompt_token_ids": [(number * 7 + j * 13) % 400 + 1 for j in range(context)]}
        llm.llm_engine.add_request(str(number), prompt, sampling)
    llm.wake_up(tags=["scheduling"])


def _intervals(llm: Any, batch: int, context: int, num_tokens: int) -> list[float]:
    """Seconds between consecutive steps that both gave every request a token."""
    _add_requests(llm, batch, context, num_tokens)
    intervals, previous = [], None
    while llm.llm_engine.has_unfinished_requests():
        outputs = llm.llm_engine.step()
        now = time.perf_counter()
        is_full = len(outputs) == batch
        if is_full and previous is not None:
            intervals.append(now - previous)
        previous = now if is_full else None
    # In the last step all requests end, and the host frees what they held.
    return intervals[_SETTLING_STEPS:-1]


if __name__ == "__main__":
    main()
