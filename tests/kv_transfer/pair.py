"""A prefill and a decode engine without a model: vLLM's real schedulers, the connector's real halves and real NIXL
agents, all in one process. What is played is the model: it writes into the KV cache what each token at each place
makes, and when it reads a request's cache it insists on just that, so that one wrong block is noticed."""

from __future__ import annotations

import os
import pickle
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from vllm.config import KVTransferConfig, set_current_vllm_config
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from services.decode.token_parallel.engine_args import engine_args
from services.decode.token_parallel.options import TokenParallelOptions
from services.decode.token_parallel.scheduler import TokenParallelScheduler
from tests.services.building import BLOCK_SIZE, MAX_MODEL_LEN
from tknp.common.partition import BlockPartition, RankPlace, set_partition, set_place
from tknp.common.ports import free_port

LAYERS, HEADS, HEAD_SIZE = 2, 4, 32
LATENT_SIZE = 96
"""Elements that latent attention keeps of a token; see `make_latent_model`."""
BYTES_PER_BLOCK = LAYERS * HEADS * BLOCK_SIZE * 2 * HEAD_SIZE * 4


def kv_of(token_ids: Sequence[int]) -> torch.Tensor:
    """What the played model keeps of each token at its place: [num_tokens]."""
    ids = torch.tensor(token_ids, dtype=torch.float32)
    return ids * 4096 + torch.arange(1, len(token_ids) + 1)


class Engine:
    """Scheduler and workers, stepped by hand."""

    def __init__(
        self,
        model: Path,
        role: str,
        num_blocks: Sequence[int],
        connector: str = "TokenParallelKVConnector",
        engine_id: str | None = None,
        block_size: int = BLOCK_SIZE,
        windows: Sequence[int | None] = (None,),
        address: str = "127.0.0.1",
        step_tokens: int = 2048,
        **extra: Any,
    ) -> None:
        """Args:
        num_blocks: of each token-parallel rank.
        windows: how many tokens back each KV cache group sees, None for all; each has LAYERS layers.
        address: where other engines find it.
        step_tokens: that one step computes at most.
        extra: `kv_connector_extra_config`.
        """
        self.port = free_port()
        os.environ |= {"VLLM_NIXL_SIDE_CHANNEL_HOST": address, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(self.port)}
        ours = {"kv_connector_module_path": "kv_transfer.connector"} if connector.startswith("Token") else {}
        self.config = EngineArgs(
            model=str(model),
            max_model_len=MAX_MODEL_LEN,
            block_size=block_size,
            dtype="float32",
            enforce_eager=True,
            enable_prefix_caching=True,
            skip_tokenizer_init=True,
            max_num_seqs=64,
            max_num_batched_tokens=step_tokens,
            kv_transfer_config=KVTransferConfig(
                kv_connector=connector,
                kv_role=role,
                kv_buffer_device="cpu",
                kv_load_failure_policy="recompute",
                kv_connector_extra_config=extra,
                **({"engine_id": engine_id} if engine_id else {}),
                **ours,
            ),
            **engine_args(TokenParallelOptions(len(num_blocks))),
        ).create_engine_config()
        self.is_latent = bool(self.config.model_config.use_mla)
        self.config.cache_config.kv_cache_layout = "LBNHC" if self.is_latent else "LBHNC"
        self.block_size = block_size
        self.windows = windows
        self.partition = BlockPartition(tuple(num_blocks))
        self.scheduler = self._make_scheduler()
        with set_current_vllm_config(self.config):
            self.workers = [self._make_worker(rank) for rank in range(len(num_blocks))]
        metadata = {(rank, 0): worker.get_handshake_metadata() for rank, worker in enumerate(self.workers)}
        self.scheduler.connector.set_xfer_handshake_metadata_pp_aware(metadata)
        self._aggregator = KVOutputAggregator.from_connector(self.scheduler.connector, len(self.workers))
        self.answered: dict[str, Any] = {}
        """What finished requests would answer as `kv_transfer_params`."""
        self.stats: dict[str, list[Any]] = {}
        self.num_steps = 0
        self.computed: dict[str, int] = {}
        """Tokens of each request that were computed here."""
        self.on_poll: Callable[[], None] = lambda: None
        """Called in each step between the posting of reads and the first look at them."""
        self.on_layer: Callable[[], None] = lambda: None
        """Called after each layer of a step in which something is computed."""

    def _make_scheduler(self) -> Any:
        is_split = self.partition.size > 1
        set_partition(self.partition if is_split else None)
        self.config.cache_config.num_gpu_blocks = self.partition.total
        return (TokenParallelScheduler if is_split else Scheduler)(
            vllm_config=self.config,
            kv_cache_config=self._kv_cache_config(self.partition.total),
            structured_output_manager=StructuredOutputManager(self.config),
            block_size=self.block_size,
            hash_block_size=self.block_size,
            log_stats=True,
        )

    def _kv_cache_config(self, num_blocks: int) -> KVCacheConfig:
        shape: dict[str, Any] = {
            "block_size": self.block_size,
            "num_kv_heads": HEADS,
            "head_size": HEAD_SIZE,
            "dtype": torch.float32,
        }
        latent = {**shape, "num_kv_heads": 1, "head_size": LATENT_SIZE}
        specs = [
            MLAAttentionSpec(**latent)
            if self.is_latent
            else FullAttentionSpec(**shape)
            if window is None
            else SlidingWindowSpec(**shape, sliding_window=window)
            for window in self.windows
        ]
        groups = [KVCacheGroupSpec(self._layers(group), spec) for group, spec in enumerate(specs)]
        return KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups)

    def _layers(self, group: int) -> list[str]:
        return [f"layers.{group * LAYERS + i}" for i in range(LAYERS)]

    def _make_worker(self, rank: int) -> Any:
        set_place(RankPlace(rank, self.partition) if self.partition.size > 1 else None)
        num_blocks = self.partition.num_blocks[rank]
        self.config.cache_config.num_gpu_blocks = num_blocks
        connector = KVConnectorFactory.create_connector(
            self.config, KVConnectorRole.WORKER, self._kv_cache_config(num_blocks)
        )
        num_heads, num_elements = (1, LATENT_SIZE) if self.is_latent else (HEADS, 2 * HEAD_SIZE)
        connector.cache = {
            name: torch.zeros(num_blocks, num_heads, self.block_size, num_elements)
            for group in range(len(self.windows))
            for name in self._layers(group)
        }
        connector.register_kv_caches({n: c.squeeze(1) if self.is_latent else c for n, c in connector.cache.items()})
        connector.connector_worker._idle_pause = 0.0  # there is nobody here to leave the core to
        return connector

    def add(self, request_id: str, prompt: Sequence[int], max_tokens: int, params: dict[str, Any]) -> None:
        init_none_hash(sha256)
        self.scheduler.add_request(
            Request(
                request_id,
                list(prompt),
                SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args={"kv_transfer_params": params}),
                None,
                block_hasher=get_request_block_hasher(self.block_size, sha256),
            )
        )

    def prefill(self, request_id: str, prompt: Sequence[int], **params: Any) -> None:
        """A prefill leg, as the router sends it; once it has finished, `answered` has what it offers."""
        self.add(request_id, prompt, 1, {"do_remote_decode": True, "do_remote_prefill": False, **params})

    def abort(self, request_id: str) -> None:
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def step(self) -> None:
        """Schedules, moves KV cache, computes."""
        self.num_steps += 1
        output = self.scheduler.schedule()
        tokens = {r: self._compute(r, n) for r, n in output.num_scheduled_tokens.items()}
        for connector in self.workers:
            connector.bind_connector_metadata(pickle.loads(pickle.dumps(output.kv_connector_metadata)))
            for layer in connector.cache if tokens else ():
                connector.save_kv_layer(layer, None, None)
                self.on_layer()
            connector.start_load_kv(None)
        self.on_poll()
        parts = [self._report(connector, output.finished_req_ids) for connector in self.workers]
        parts[0].req_ids = list(tokens)
        parts[0].req_id_to_index = {r: i for i, r in enumerate(tokens)}
        parts[0].sampled_token_ids = list(tokens.values())
        merged = self._aggregator.aggregate(parts)
        outputs = self.scheduler.update_from_output(output, merged)
        for group in outputs.values():
            for one in group.outputs:
                if one.finish_reason is not None:
                    self.answered[one.request_id] = one.kv_transfer_params
            if group.scheduler_stats is not None and group.scheduler_stats.kv_connector_stats:
                for name, values in group.scheduler_stats.kv_connector_stats.items():
                    self.stats.setdefault(name, []).extend(values)

    def _report(self, connector: Any, finished: set[str]) -> ModelRunnerOutput:
        results = connector.get_transfer_results(finished)
        report = KVConnectorOutput(
            finished_sending=results.finished_sending,
            finished_recving=results.finished_recving,
            failed_recving=results.failed_recving,
            invalid_block_ids=connector.get_block_ids_with_load_errors(),
            kv_connector_stats=connector.get_kv_connector_stats(),
            kv_connector_worker_meta=connector.build_connector_worker_meta(),
        )
        connector.clear_connector_metadata()
        return ModelRunnerOutput([], {}, kv_connector_output=report)

    def _compute(self, request_id: str, num_tokens: int) -> list[int]:
        """Writes the KV of the scheduled tokens, reads what they see, and samples one if the prompt is done.

        Raises:
            AssertionError: what lies in the cache is not the request's.
        """
        request = self.scheduler.requests[request_id]
        first, last = request.num_computed_tokens - num_tokens, request.num_computed_tokens
        self.computed[request_id] = self.computed.get(request_id, 0) + num_tokens
        rank, blocks_by_group = self._place(request_id)
        expected = kv_of(request.all_token_ids[:last])
        for group, (blocks, window) in enumerate(zip(blocks_by_group, self.windows, strict=True)):
            seen = 0 if window is None else max(0, first - window + 1)
            for name in self._layers(group):
                cache = self.workers[rank].cache[name]
                for index in range(first // self.block_size, -(-last // self.block_size)):
                    begin, end = max(first, index * self.block_size), min(last, (index + 1) * self.block_size)
                    at = slice(begin - index * self.block_size, end - index * self.block_size)
                    cache[blocks[index], :, at] = expected[begin:end, None]
                found = cache[blocks].transpose(1, 2).flatten(0, 1)[seen:last]
                assert (found == expected[seen:, None, None]).all(), f"{request_id} reads KV cache that is not its own"
        return [last] if last >= request.num_tokens else []

    def _place(self, request_id: str) -> tuple[int, list[list[int]]]:
        """The rank that holds the request, and its blocks there by group, by their ids on that rank."""
        groups = self.scheduler.kv_cache_manager.get_block_ids(request_id)
        rank = self.partition.rank_of_all(block for blocks in groups for block in blocks) or 0
        return rank, [[block - self.partition.bases[rank] for block in blocks] for blocks in groups]

    @property
    def num_free_blocks(self) -> int:
        manager = self.scheduler.kv_cache_manager
        pools = [m.block_pool for m in getattr(manager, "managers", [manager])]
        return sum(pool.get_num_free_blocks() for pool in pools)

    @property
    def num_usable_blocks(self) -> int:
        """All but each rank's null block."""
        return self.partition.total - self.partition.size

    def is_idle(self) -> bool:
        return not self.scheduler.has_requests()

    def lose_lease(self, request_id: str) -> None:
        """The lease of a request that has been prefilled runs out now, if it has not ended yet."""
        leases = self.workers[0].connector_worker._reqs_to_send
        if request_id not in leases:
            self.step()  # the worker hears of it
        if request_id in leases:
            leases[request_id] = 0.0
            self.step()

    def overwrite(self) -> None:
        """Fills every free block with other prompts' KV cache, and frees it again."""
        count = self.num_free_blocks * self.block_size // (len(self.windows) * MAX_MODEL_LEN)
        for i in range(count):
            self.prefill(f"overwrite-{self.num_steps}-{i}", prompt(MAX_MODEL_LEN - 1, self.num_steps + i))
        run(self, until=lambda: not self.scheduler.has_unfinished_requests())
        for request_id in list(self.scheduler.requests):
            if request_id.startswith("overwrite"):
                self.lose_lease(request_id)

    def shutdown(self) -> None:
        for connector in (*self.workers, self.scheduler.connector):
            connector.shutdown()


def make_latent_model(directory: Path) -> Path:
    """A model with multi-head latent attention, of which only the configuration is needed."""
    AutoConfig.for_model(
        "deepseek_v2",
        architectures=["DeepseekV2ForCausalLM"],
        vocab_size=512,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=64,
        qk_rope_head_dim=LATENT_SIZE - 64,
        qk_nope_head_dim=32,
        v_head_dim=32,
        n_routed_experts=2,
        n_shared_experts=1,
        num_experts_per_tok=1,
        moe_intermediate_size=64,
        first_k_dense_replace=LAYERS,
        max_position_embeddings=4096,
    ).save_pretrained(directory)
    return directory


class Pair:
    """One prefill and one decode engine with two ranks."""

    def __init__(self, model: Path, prefill: dict[str, Any], decode: dict[str, Any]) -> None:
        self.prefill = Engine(model, prefill.pop("role", "kv_producer"), **{"num_blocks": [60], **prefill})
        self.decode = Engine(model, decode.pop("role", "kv_consumer"), **{"num_blocks": [40, 40], **decode})
        self.num_requests = 0

    def offer(self, tokens: list[int], **params: Any) -> Any:
        """The prefill leg: what the prefill engine answers."""
        self.num_requests += 1
        name = f"p{self.num_requests}"
        self.prefill.prefill(name, tokens, **params)
        run(self.prefill, until=lambda: name in self.prefill.answered)
        return self.prefill.answered[name]

    def hand_over(self, tokens: list[int], params: Any, index: str = "") -> int:
        """The decode leg, to its end. Returns how many tokens the decode engine computed of the prompt."""
        self.num_requests += 1
        name = f"{index}d{self.num_requests}"
        self.decode.add(name, tokens, 3, dict(params))
        run(self.prefill, self.decode, until=lambda: name in self.decode.answered)
        return self.decode.computed[name] - 2

    def lose(self, params: Any) -> None:
        """The lease of an offer runs out, and others write to its blocks."""
        self.prefill.lose_lease(params["remote_request_id"])
        self.prefill.overwrite()

    def settle(self) -> list[str]:
        """Waits until nothing is held on either side. Returns what was stale since the last call."""
        run(self.prefill, self.decode, until=lambda: self.prefill.is_idle() and self.decode.is_idle(), seconds=120.0)
        for engine in (self.prefill, self.decode):
            assert engine.num_free_blocks == engine.num_usable_blocks
            engine.scheduler.reset_prefix_cache()
        return self.decode.stats.pop("stale_reason", [])


def prompt(num_tokens: int, seed: int) -> list[int]:
    return random.Random(f"{seed}/{num_tokens}").choices(range(5, 455), k=num_tokens)


def run(*engines: Engine, until: Callable[[], bool], seconds: float = 30.0) -> None:
    """Steps all engines in turn.

    Raises:
        AssertionError: after so long it is still not so.
    """
    deadline = time.perf_counter() + seconds
    while not until():
        assert time.perf_counter() < deadline, (
            f"not so after {seconds} s: {[list(e.scheduler.requests) for e in engines]}"
        )
        for engine in engines:
            engine.step()
