"""A real vLLM engine with random weights, as one side of KV transfer."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY

from bench.shapes import SHAPES
from bench.transfer.side import CONNECTORS
from services.kv_peers import EXTENSION

STREAMED_TOKENS = 6000
"""That a stream is answered at most, more than a comparison takes."""

_STREAM, _STREAM_SEED = "stream-", 4001
_NOTHING_SECONDS = 1.8
_JUST_BEFORE = 20


@dataclass(frozen=True)
class Watched:
    """What one stream on a decode engine saw; seconds.

    Attributes:
        before, during, after: between its tokens, just before a prompt came, until the token after the prompt's first
            one, and from then on.
        shared: from when the prompt came to its first token.
    """

    before: list[float]
    during: list[float]
    after: list[float]
    shared: float


@dataclass(frozen=True)
class EngineJob:
    """As SideJob; `max_model_len`, and `step_tokens` of a step, in tokens.

    Attributes:
        has_prefix_cache: to see what a prompt costs whose KV cache is here already.
        tells_layers: of a streamed prompt, so that they are pulled while the others are computed.
        kv_cache_bytes: enough for the largest case and some, and so little that several engines fit on a GPU.
    """

    path: str
    role: str
    shape: str
    block_size: int
    max_model_len: int
    device: int
    port: int
    step_tokens: int = 16_384
    has_prefix_cache: bool = False
    tells_layers: bool = True
    kv_cache_bytes: int = 20 << 30


def serve(job: EngineJob, pipe: Any) -> None:
    """Answers ("generate", requests, tokens, seed, `kv_transfer_params` of each or None, tokens of an answer or none
    for one) with seconds to the last answer's end, each first token and what its request leaves for a decode engine,
    and the time at the end; ("peer",), ("meet", peer) and ("kv_bytes",) as Engine does."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(job.device)
    os.environ["VLLM_NIXL_SIDE_CHANNEL_HOST"] = "127.0.0.1"
    os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(job.port)
    engine = Engine(job)
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        name, *arguments = order
        pipe.send(getattr(engine, name)(*arguments))
    engine.shutdown()


class Engine:
    """See the module."""

    def __init__(self, job: EngineJob) -> None:
        from vllm import LLM

        self._num_ids = SHAPES[job.shape].vocab_size - 1
        self._num_watched = 0
        self._llm = LLM(
            # One directory for all: the connectors compare its name.
            str(SHAPES[job.shape].write_config(Path(tempfile.gettempdir()) / f"tknp-bench-{job.shape}")),
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=job.max_model_len,
            max_num_seqs=32,
            max_num_batched_tokens=job.step_tokens,
            gpu_memory_utilization=0.1,  # which has to be free; what is taken for KV cache comes next
            kv_cache_memory_bytes=job.kv_cache_bytes,
            enable_prefix_caching=job.has_prefix_cache,
            **_graphs(job),
            block_size=job.block_size,
            disable_log_stats=False,
            worker_extension_cls=EXTENSION if job.role != "kv_producer" and job.path != "stock" else "",
            kv_transfer_config=_transfer_config(job),
        )

    def peer(self) -> dict[str, Any]:
        """Where a decode engine finds it before it has offered anything."""
        config = self._llm.llm_engine.vllm_config
        return {
            "remote_engine_id": config.kv_transfer_config.engine_id,
            "remote_host": os.environ["VLLM_NIXL_SIDE_CHANNEL_HOST"],
            "remote_port": int(os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"]),
            "tp_size": config.parallel_config.tensor_parallel_size,
        }

    def meet(self, peer: dict[str, Any]) -> None:
        """Connects to a prefill engine ahead of the first request, as the router has it done."""
        sizes = {"tp_size": peer["tp_size"], "dcp_size": 1, "pp_size": 1}
        where = {"engine_id": peer["remote_engine_id"], "host": peer["remote_host"], "port": peer["remote_port"]}
        self._llm.collective_rpc("connect_kv_peer", args=({**where, **sizes},))

    def kv_bytes(self) -> tuple[float, float]:
        """Pulled since the start, and of these hidden behind prefill."""
        values = {"tknp_kv_transfer_bytes_total": 0.0, "tknp_kv_transfer_hidden_bytes_total": 0.0}
        for sample in (sample for family in REGISTRY.collect() for sample in family.samples):
            if sample.name in values:
                values[sample.name] += sample.value
        total, hidden = values.values()
        return total, hidden

    def generate(
        self, requests: int, tokens: int, seed: int, offers: list[Any] | None, max_tokens: int = 1
    ) -> tuple[float, list[Any], float]:
        prompts, sampling = self._requests(requests, tokens, seed, offers, max_tokens)
        begin = time.perf_counter()
        outputs = self._llm.generate(prompts, sampling, use_tqdm=False)
        end = time.perf_counter()
        answers = [(output.outputs[0].token_ids[0], output.kv_transfer_params) for output in outputs]
        return end - begin, answers, end

    def open_streams(self, count: int, tokens: int) -> None:
        """Requests that are answered until there are others, but only within `watch`."""
        self._llm.llm_engine.abort_request([f"{_STREAM}{i}" for i in range(count)])
        prompts, sampling = self._requests(count, tokens, _STREAM_SEED, None, STREAMED_TOKENS)
        for i, (prompt, params) in enumerate(zip(prompts, sampling, strict=True)):
            self._llm.llm_engine.add_request(f"{_STREAM}{i}", prompt, params)
        waiting = {f"{_STREAM}{i}" for i in range(count)}
        while waiting:
            waiting -= {output.request_id for output in self._llm.llm_engine.step()}

    def watch(
        self, lead: float, rest: float, requests: int, tokens: int, seed: int, offers: list[Any] | None
    ) -> Watched:
        """Answers the streams for `lead` seconds, until all of the requests with these offers have their first token,
        and for `rest` seconds; without offers, as long as `_NOTHING_SECONDS` instead of them.

        Raises:
            RuntimeError: the streams have ended.
        """
        engine, missing, came, ended = self._llm.llm_engine, set[str](), 0.0, 0.0
        prompts, sampling = self._requests(requests, tokens, seed, offers)
        begin = time.perf_counter()
        ticks: list[float] = []
        while not ended or time.perf_counter() < ended + rest:
            now = time.perf_counter()
            if not came and now >= begin + lead:
                came = now
                for i in range(requests if offers else 0):
                    missing.add(f"watched-{self._num_watched}-{i}")
                    engine.add_request(f"watched-{self._num_watched}-{i}", prompts[i], sampling[i])
            outputs = {output.request_id: output for output in engine.step()}
            now = time.perf_counter()
            if f"{_STREAM}0" in outputs:
                if outputs[f"{_STREAM}0"].finished:
                    raise RuntimeError(f"a stream has ended after {STREAMED_TOKENS} tokens; measure fewer repeats")
                ticks.append(now)
            missing -= outputs.keys()
            if came and not ended and not missing and (offers or now > came + _NOTHING_SECONDS):
                ended = now
        self._num_watched += 1
        first = max(i for i, tick in enumerate(ticks) if tick <= came)
        last = min(i for i, tick in enumerate(ticks) if tick > ended)
        gaps = [b - a for a, b in pairwise(ticks)]
        # What was computed before it was watched comes all at once, in the beginning.
        return Watched(gaps[max(0, first - _JUST_BEFORE) : first], gaps[first:last], gaps[last:], ended - came)

    def _requests(
        self, count: int, tokens: int, seed: int, offers: list[Any] | None, max_tokens: int = 1
    ) -> tuple[list[Any], list[Any]]:
        from vllm import SamplingParams

        prompts = [
            {"prompt_token_ids": [(i * 7919 + j * 13 + seed * 101) % self._num_ids + 1 for j in range(tokens)]}
            for i in range(count)
        ]
        sampling = [
            SamplingParams(
                temperature=0,
                max_tokens=max_tokens,
                ignore_eos=True,
                detokenize=False,
                extra_args={"kv_transfer_params": offers[i]} if offers else None,
            )
            for i in range(count)
        ]
        return prompts, sampling

    def shutdown(self) -> None:
        """Ends the engine's own process, too, which would keep its ports."""
        self._llm.llm_engine.engine_core.shutdown()


def _graphs(job: EngineJob) -> dict[str, Any]:
    """Decode steps replay CUDA graphs, as anybody's do, and prompts are computed without, which costs them little and
    starts sooner."""
    if job.role != "kv_consumer":
        return {"enforce_eager": True}
    config = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]}
    return {"compilation_config": config}


def _transfer_config(job: EngineJob) -> dict[str, Any]:
    connector = CONNECTORS[job.path]
    config = {"kv_role": job.role, "kv_load_failure_policy": "fail", **connector}
    if not job.tells_layers:
        config["kv_connector_extra_config"] = {**connector["kv_connector_extra_config"], "stream_layers": False}
    return config
