"""One engine's side of KV transfer without its model: a KV cache, and both halves of a real connector.

Runs in a process of its own and takes orders from the benchmark; see `serve`.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.shapes import SHAPES

CONNECTORS: dict[str, dict[str, Any]] = {
    "stock": {"kv_connector": "NixlConnector"},
    "nixl": {
        "kv_connector": "TokenParallelKVConnector",
        "kv_connector_module_path": "kv_transfer.connector",
        "kv_connector_extra_config": {"kv_transfer_path": "nixl"},
    },
    "direct": {
        "kv_connector": "TokenParallelKVConnector",
        "kv_connector_module_path": "kv_transfer.connector",
        "kv_connector_extra_config": {"kv_transfer_path": "direct"},
    },
    "packed": {
        "kv_connector": "TokenParallelKVConnector",
        "kv_connector_module_path": "kv_transfer.connector",
        "kv_connector_extra_config": {"kv_transfer_path": "packed"},
    },
    "packed+fp8": {
        "kv_connector": "TokenParallelKVConnector",
        "kv_connector_module_path": "kv_transfer.connector",
        "kv_connector_extra_config": {"kv_transfer_path": "packed", "kv_transfer_compression": "fp8"},
    },
}
"""What is compared, by the name of the path: vLLM's own connector, and ours on its paths."""

_PULL_SECONDS = 30.0


@dataclass(frozen=True)
class SideJob:
    """One side.

    Attributes:
        role: kv_producer or kv_consumer.
        device: CUDA device that the process sees; None for the CPU.
        num_blocks: of the KV cache, all layers together.
    """

    path: str
    role: str
    shape: str
    block_size: int
    num_blocks: int
    device: int | None
    port: int


def serve(job: SideJob, pipe: Any) -> None:
    """Answers orders until it is told None: ("offer", tokens, [blocks…]) with the offers, ("pull", tokens, offers,
    [blocks…], seed or None) with a `Pulled`, and ("fill", seed). Between orders it polls, as an engine does."""
    if job.device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(job.device)
    os.environ["VLLM_NIXL_SIDE_CHANNEL_HOST"] = "127.0.0.1"
    os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(job.port)
    side = Side(job)
    gc.collect()
    gc.freeze()  # as vLLM's engine does
    pipe.send("ready")
    while True:
        if not pipe.poll(0.0005):
            side.step()
            continue
        order = pipe.recv()
        if order is None:
            break
        name, *arguments = order
        pipe.send(getattr(side, name)(*arguments))
    side.shutdown()


@dataclass(frozen=True)
class Pulled:
    """Pulls of several requests at once.

    Attributes:
        seconds: from the order until the last was complete.
        wrong_blocks: blocks of the cache that don't hold what they should, others than the pulled ones included; None
            if that was not looked at.
    """

    seconds: float
    wrong_blocks: int | None


class Side:
    """See the module."""

    def __init__(self, job: SideJob) -> None:
        import torch
        from vllm.config import set_current_vllm_config
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

        self._job = job
        self._shape = SHAPES[job.shape]
        self._device = torch.device("cpu" if job.device is None else "cuda:0")
        if job.device is not None:
            torch.cuda.set_device(0)
        self._config = _vllm_config(job)
        with set_current_vllm_config(self._config):
            _join_world_of_one()
            kv_cache_config, self._caches = self._allocate()
            self._scheduler = KVConnectorFactory.create_connector(
                self._config, KVConnectorRole.SCHEDULER, kv_cache_config
            )
            self._worker = KVConnectorFactory.create_connector(self._config, KVConnectorRole.WORKER, kv_cache_config)
            self._worker.register_kv_caches(self._caches)
        if job.role == "kv_producer":
            self._scheduler.set_xfer_handshake_metadata_pp_aware({(0, 0): self._worker.get_handshake_metadata()})
        self._num_requests = 0
        self.sent: set[str] = set()

    def _allocate(self) -> tuple[Any, dict[str, Any]]:
        """As vLLM's FlashAttention backend has it: per layer `[num_blocks, num_kv_heads, block_size, 2 * head_size]`,
        all layers in one allocation."""
        import torch
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

        shape, job = self._shape, self._job
        names = [f"model.layers.{i}.self_attn.attn" for i in range(shape.num_layers)]
        spec = FullAttentionSpec(
            block_size=job.block_size, num_kv_heads=shape.num_kv_heads, head_size=shape.head_size, dtype=torch.bfloat16
        )
        page = (job.num_blocks, shape.num_kv_heads, job.block_size, 2 * shape.head_size)
        self._backing = torch.zeros((shape.num_layers, *page), dtype=torch.bfloat16, device=self._device)
        config = KVCacheConfig(job.num_blocks, [], [KVCacheGroupSpec(names, spec)])
        return config, dict(zip(names, self._backing, strict=True))

    def _words(self) -> Any:
        """The cache as `[num_layers, num_blocks, words]`."""
        import torch

        return self._backing.view(torch.int32).view(self._shape.num_layers, self._job.num_blocks, -1)

    def fill(self, seed: int) -> int:
        """Random bytes, the same for the same seed on the same kind of device; the number of blocks."""
        import torch

        generator = torch.Generator(self._device).manual_seed(seed)
        for layer in self._words():
            layer.random_(-(2**31), 2**31 - 1, generator=generator)
        return self._job.num_blocks

    def shutdown(self) -> None:
        for half in (self._worker, self._scheduler):
            half.shutdown()

    # -- an engine's steps --

    def step(self) -> set[str]:
        """One step without tokens; requests whose pull is complete.

        Raises:
            RuntimeError: a pull failed.
        """
        from vllm.v1.core.sched.output import SchedulerOutput

        self._worker.bind_connector_metadata(self._scheduler.build_connector_meta(SchedulerOutput.make_empty()))
        self._worker.start_load_kv(None)
        results = self._worker.get_transfer_results(set())
        self._worker.clear_connector_metadata()
        self.sent |= results.finished_sending
        if results.failed_recving:
            raise RuntimeError(f"pulls failed: {sorted(results.failed_recving)}")
        return set(results.finished_recving)

    def _request(self, tokens: int, params: dict[str, Any]) -> Any:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        self._num_requests += 1
        sampling = SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": params})
        return Request(f"{self._job.role}-{self._num_requests}", [1] * tokens, sampling, None)

    def _blocks(self, ids: Sequence[int]) -> Any:
        from vllm.v1.core.kv_cache_manager import KVCacheBlocks
        from vllm.v1.core.kv_cache_utils import KVCacheBlock

        return KVCacheBlocks(([KVCacheBlock(i) for i in ids],))

    # -- orders --

    def offer(self, tokens: int, blocks: list[list[int]]) -> list[dict[str, Any]]:
        """What requests that were just prefilled into these blocks leave for the decode engine."""
        from vllm.v1.request import RequestStatus

        offers = []
        for ids in blocks:
            request = self._request(tokens, {"do_remote_decode": True})
            self._scheduler.update_state_after_alloc(request, self._blocks(ids), 0)
            self.step()
            request.status, request.num_computed_tokens = RequestStatus.FINISHED_LENGTH_CAPPED, tokens
            is_kept, params = self._scheduler.request_finished_all_groups(request, (ids,))
            assert is_kept and params is not None
            offers.append(params)
        self.step()
        return offers

    def pull(
        self, tokens: int, offers: list[dict[str, Any]], blocks: list[list[int]], seeds: tuple[int, int] | None
    ) -> Pulled:
        """Pulls one request's KV into each of `blocks`.

        Args:
            seeds: with which the producer's cache was filled, and this one's is to be filled first, to compare.
        """
        import torch

        if seeds is not None:
            self.fill(seeds[1])
        requests = [self._request(tokens, params) for params in offers]
        allocated = [self._blocks(ids) for ids in blocks]
        if self._job.device is not None:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for request, its_blocks in zip(requests, allocated, strict=True):
            count, is_async = self._scheduler.get_num_new_matched_tokens(request, 0)
            assert is_async
            self._scheduler.update_state_after_alloc(request, its_blocks, count)
        missing = {request.request_id for request in requests}
        while missing:
            missing -= self.step()
            if missing:
                time.sleep(2e-5)  # a handshake runs in another thread, which needs the interpreter too
            if time.perf_counter() - begin > _PULL_SECONDS:
                raise RuntimeError(f"{len(missing)} of {len(requests)} pulls did not end in {_PULL_SECONDS:.0f} s")
        seconds = time.perf_counter() - begin
        return Pulled(seconds, None if seeds is None else self._count_wrong(seeds, offers, blocks))

    def _count_wrong(self, seeds: tuple[int, int], offers: list[dict[str, Any]], blocks: list[list[int]]) -> int:
        import torch

        here = torch.tensor([i for ids in blocks for i in ids], device=self._device)
        there = torch.tensor([i for params in offers for i in params["remote_block_ids"][0]], device=self._device)
        wrong = torch.zeros(self._job.num_blocks, dtype=torch.bool, device=self._device)
        generators = [torch.Generator(self._device).manual_seed(seed) for seed in seeds]
        for layer in self._words():
            theirs, expected = (torch.empty_like(layer) for _ in range(2))
            for tensor, generator in zip((theirs, expected), generators, strict=True):
                tensor.random_(-(2**31), 2**31 - 1, generator=generator)
            expected[here] = self._arrived(theirs[there])
            wrong |= (layer != expected).any(dim=1)
        return int(wrong.sum())

    def _arrived(self, words: Any) -> Any:
        """What should become of blocks on their way."""
        extra = CONNECTORS[self._job.path].get("kv_connector_extra_config", {})
        if extra.get("kv_transfer_compression") != "fp8":
            return words
        import torch

        from kv_transfer.packed.fp8 import HeadShape, round_trip

        shape = HeadShape.of(list(self._caches.values()), values_follow=self._device.type == "cpu")
        return round_trip(words.view(torch.bfloat16), shape).view(torch.int32)


def _vllm_config(job: SideJob) -> Any:
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import EngineArgs

    transfer: dict[str, Any] = {
        "kv_role": job.role,
        "kv_load_failure_policy": "fail",
        "kv_buffer_device": "cpu" if job.device is None else "cuda",
        **CONNECTORS[job.path],
    }
    config = EngineArgs(
        # One path for all: the connectors compare its name.
        model=str(SHAPES[job.shape].write_config(Path(tempfile.gettempdir()) / f"tknp-bench-{job.shape}")),
        skip_tokenizer_init=True,
        load_format="dummy",
        max_model_len=65_536,
        max_num_batched_tokens=65_536,
        block_size=job.block_size,
        enforce_eager=True,
        enable_prefix_caching=False,
        kv_transfer_config=KVTransferConfig(**transfer),
    ).create_engine_config()
    config.cache_config.kv_cache_layout = "LBHNC"
    return config


def _join_world_of_one() -> None:
    import torch
    from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel

    if torch.distributed.is_initialized():
        return
    store = Path(tempfile.mkdtemp()) / "store"
    init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
    initialize_model_parallel(1, 1)
