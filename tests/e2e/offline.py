"""One run of `TokenParallelLLM`, as a user would write it: `python -m tests.e2e.offline settings.json result.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.e2e import expected


def main() -> None:
    from services.decode.token_parallel.llm import TokenParallelLLM

    settings = json.loads(Path(sys.argv[1]).read_text())
    llm = TokenParallelLLM(**settings)
    result = {
        "tokens": generate(llm),
        "preemptions": next(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"),
        "classes": classes_in_use(llm),
        "status": llm.token_parallel_status() if settings["token_parallel_size"] > 1 else [],
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


def generate(llm: Any) -> list[list[list[int]]]:
    """Answers to `expected.long_answers()`, all at once."""
    from vllm import SamplingParams

    asks = expected.long_answers()
    outputs = llm.generate(
        [{"prompt_token_ids": ask.body["prompt"]} for ask in asks],
        [SamplingParams(temperature=0, ignore_eos=True, max_tokens=ask.body["max_tokens"]) for ask in asks],
        use_tqdm=False,
    )
    return [[list(choice.token_ids) for choice in output.outputs] for output in outputs]


def classes_in_use(llm: Any) -> list[str]:
    """Names of the classes of worker, attention backends, their builders and implementations, scheduler and
    executor."""
    config = llm.llm_engine.vllm_config
    names = [str(config.scheduler_config.scheduler_cls), str(config.parallel_config.distributed_executor_backend)]
    return names + [name for worker in llm.collective_rpc(_classes_in_worker) for name in worker]


def _classes_in_worker(worker: Any) -> list[str]:
    from vllm.model_executor.layers.attention import Attention

    layers = worker.worker.vllm_config.compilation_config.static_forward_context.values()
    attention = [layer for layer in layers if isinstance(layer, Attention)]
    classes = [type(worker.worker), *(type(layer.impl) for layer in attention)]
    classes += [cls for layer in attention for cls in (layer.attn_backend, layer.attn_backend.get_builder_cls())]
    return [f"{cls.__module__}.{cls.__qualname__}" for cls in classes]


if __name__ == "__main__":
    main()
