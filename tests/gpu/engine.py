"""One engine answers the prompts: `python -m tests.gpu.engine '<json of EngineSpec>' MODEL OUT.json`."""

from __future__ import annotations

import json
import os
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NUM_PROMPTS, NUM_TOKENS = 40, 64
_SHARED, _MAX_MODEL_LEN, _BLOCKS_OF_RANK = 160, 512, 70
_CHOSEN_BLOCKS, _SEVERAL = 200, 4
_SIZES = [1, 2, 4, 8, 16, 24, 32, 40, 48, 64]


@dataclass(frozen=True)
class EngineSpec:
    """One way to run a model.

    Attributes:
        variant: `chosen` for one micro-batch or two, as a rule says at each step, `serial` for never two, `piecewise`
            for no FULL CUDA graphs either, `spread` for weights on all ranks.
        chunk: tokens of prompts, at most, in a step.
        max_num_seqs: requests, at most, in a step.
        attention: vLLM's backend; None leaves the choice to it.
        weights: quantisation that vLLM does when it loads.
    """

    name: str
    model: str = "llama"
    tensor_parallel_size: int = 1
    token_parallel_size: int = 1
    variant: str = ""
    dtype: str = "bfloat16"
    attention: str | None = None
    weights: str | None = None
    chunk: int = 128
    max_num_seqs: int = _SIZES[-1]
    num_roundings: int = 1
    """See compare.verdict."""

    @property
    def num_gpus(self) -> int:
        return self.tensor_parallel_size * self.token_parallel_size

    def as_argument(self) -> str:
        return json.dumps(asdict(self))


def prompts() -> list[list[int]]:
    """Every fifth begins with the same tokens; many are longer than a chunk."""
    rng = random.Random(1)
    shared = rng.choices(range(5, 350), k=_SHARED)
    drawn = [rng.choices(range(5, 350), k=rng.randint(3, 300)) for _ in range(NUM_PROMPTS)]
    return [shared + drawn[i][:100] if i % 5 == 0 else drawn[i] for i in range(NUM_PROMPTS)]


def main() -> None:
    spec = EngineSpec(**json.loads(sys.argv[1]))
    llm = _start(spec, sys.argv[2])
    rounds, micro_batches = [], set()
    for _ in range(2):  # the second one finds prefixes in the cache
        answers, seen = _answers(llm, spec)
        rounds += answers
        micro_batches |= seen
    counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    result = {
        "answers": rounds,
        "preemptions": counts["vllm:num_preemptions"],
        "prefix_hits": counts["vllm:prefix_cache_hits"],
        "micro_batches": sorted(micro_batches),
    }
    Path(sys.argv[3]).write_text(json.dumps(result))


def _start(spec: EngineSpec, model: str) -> Any:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from services.decode.token_parallel.llm import TokenParallelLLM

    ranks = spec.token_parallel_size
    graphs: dict[str, Any] = {"cudagraph_capture_sizes": _SIZES}
    if spec.variant == "piecewise":
        graphs["cudagraph_mode"] = "PIECEWISE"
    if spec.variant == "chosen":  # whose rule the workers are told by a function
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    overlap_from = {"": 4, "spread": 4, "chosen": None}.get(spec.variant, 0)
    # Enough for as many requests as two micro-batches could pay with.
    blocks = _CHOSEN_BLOCKS if spec.variant == "chosen" else _BLOCKS_OF_RANK
    llm = TokenParallelLLM(
        model,
        dtype=spec.dtype,
        tensor_parallel_size=spec.tensor_parallel_size,
        token_parallel_size=ranks,
        # So few that requests are preempted; the reference has room for all of them.
        blocks_per_rank=[blocks] * ranks if ranks > 1 else None,
        overlap_from=overlap_from,
        token_parallel_weights="spread" if spec.variant == "spread" else "root",
        attention_backend=AttentionBackendEnum[spec.attention] if spec.attention else None,
        quantization=spec.weights,
        max_model_len=_MAX_MODEL_LEN,
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=spec.chunk,
        block_size=16,
        # Fixed, because engines that share a GPU would measure one another's memory.
        gpu_memory_utilization=0.1,
        kv_cache_memory_bytes=1 << 30,
        compilation_config=graphs,
        enable_prefix_caching=True,
        logprobs_mode="raw_logits",
        skip_tokenizer_init=True,
        disable_log_stats=False,
    )
    if spec.variant == "chosen":
        llm.collective_rpc(_choose, args=(spec.token_parallel_size,))
    return llm


def _choose(worker: Any, num_ranks: int) -> None:
    """In each worker: two micro-batches in steps of 32 rows and more, one in those of 24, of which there are graphs of
    both kinds, too: these models are too small for two to pay. Attention takes no time, and the root's products change
    with the rows."""
    from services.decode.token_parallel.overlap import Overlap, RootPace

    root = RootPace(num_layers=0, rows=(24, 32), halved=(1.5, 0.5), whole=(1.0, 1.0))
    worker.set_token_parallel_overlap(Overlap(root, block_seconds=1e-9, num_ranks=num_ranks))


def _answers(llm: Any, spec: EngineSpec) -> tuple[list[dict[str, Any]], set[int]]:
    """All prompts at once: tokens and logits of each, and the micro-batches of the steps that were looked at."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=5, detokenize=False)
    for number, prompt in enumerate(prompts()):
        llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
    finished, steps, seen = {}, 0, set()
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                choice = output.outputs[0]
                logits = [{token: of.logprob for token, of in best.items()} for best in choice.logprobs]
                finished[int(output.request_id)] = {"tokens": list(choice.token_ids), "logits": logits}
        steps += 1
        if spec.token_parallel_size > 1 and steps % 4 == 0:
            root = llm.token_parallel_status()[0]
            if root["graph_rows"] >= _SEVERAL:
                seen.add(root["num_micro_batches"])
    return [finished[number] for number in range(NUM_PROMPTS)], seen


if __name__ == "__main__":
    main()
