"""A rank that holds KV cache and attends for its own requests: no weights, no embedding, no MLP, no sampler."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.distributed.kv_transfer.kv_transfer_state import ensure_kv_transfer_initialized, ensure_kv_transfer_shutdown
from vllm.distributed.utils import get_worker_rank_suffix
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.profiler.wrapper import create_worker_profiler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.gpu.attn_utils import init_attn_backend, init_kv_cache
from vllm.v1.worker.gpu_worker import init_worker_distributed_environment
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin
from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase

from services.decode.token_parallel.batch import Batch
from services.decode.token_parallel.context import TokenParallelContext
from services.decode.token_parallel.graph_setup import make_graphs
from services.decode.token_parallel.group import join_group
from services.decode.token_parallel.kv_graphs import KVGraphs
from services.decode.token_parallel.layers import attention_layers, make_layers, parameter_bytes
from services.decode.token_parallel.overlap import Overlap
from services.decode.token_parallel.rows import RowLayout
from services.decode.token_parallel.status import block_report, worker_status
from services.kv_peers import KVBothWorker
from tknp.common.partition import RankPlace, set_place

logger = init_logger(f"vllm.{__name__}")


class KVWorker(KVBothWorker, WorkerBase):
    """Serves one root worker: per step and layer it receives query, key and value rows, updates its cache, attends,
    and sends the outputs back. It answers every call that vLLM makes to all workers of an engine."""

    context: TokenParallelContext
    device: torch.device

    # -- start --

    def init_device(self) -> None:
        if current_platform.is_cpu():
            self.device = torch.device("cpu")
            # vLLM's shared-memory collectives name their segments by this (v1/worker/cpu_worker.py, init_device).
            os.environ["VLLM_DIST_IDENT"] = Path(self.distributed_init_method.removeprefix("file://")).name
        else:
            index = current_platform.logical_device_id_to_visible_device_id(self.local_rank)
            self.device = torch.device(current_platform.device_type, index)
            torch.accelerator.set_device_index(self.device)
        init_worker_distributed_environment(
            self.vllm_config, self.rank, self.distributed_init_method, self.local_rank, current_platform.dist_backend
        )
        self._group, self.context = join_group(self.vllm_config, self.local_rank)
        self._ready_seconds = time.time() - psutil.Process().create_time()

    _ready_seconds = 0.0
    """From the start of this process until it was ready for steps, less the time in which it waited for the root."""

    @contextmanager
    def _getting_ready(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._ready_seconds += time.perf_counter() - started

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        specs = self._group.broadcast_object(None, src=0)  # once the root has loaded its weights
        with self._getting_ready():
            make_layers(self.vllm_config, specs, self.device)
            layers = attention_layers(self.vllm_config)
            self.context.graphs = make_graphs(self.vllm_config, self._group, layers, self.device)

    def get_kv_cache_spec(self) -> dict[str, Any]:
        return {}  # the root's holds

    def determine_available_memory(self) -> int:
        """Bytes for KV cache."""
        if self.cache_config.kv_cache_memory_bytes is not None:
            return int(self.cache_config.kv_cache_memory_bytes)
        if current_platform.is_cpu():
            raise ValueError(
                "on CPU a token-parallel rank needs a fixed KV cache size; set VLLM_CPU_KVCACHE_SPACE to GiB per rank"
            )
        free, total = torch.accelerator.get_memory_info(self.device)
        # Rows in flight and the allocator's slack; a KV worker has no activations to profile.
        headroom = 2 << 30
        allowed = int(total * self.cache_config.gpu_memory_utilization)
        return allowed - int(total - free) - headroom

    def update_max_model_len(self, max_model_len: int) -> None:
        self.model_config.max_model_len = max_model_len

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        with self._getting_ready():
            self._make_cache(kv_cache_config)

    def _make_cache(self, kv_cache_config: Any) -> None:
        place = RankPlace(self.context.rank, kv_cache_config.token_parallel_partition, self.context.shard)
        set_place(place)
        self.cache_config.num_gpu_blocks = kv_cache_config.num_blocks
        if kv_cache_config.kv_cache_layout is not None:
            self.set_kv_cache_layout(kv_cache_config.kv_cache_layout)
        self.cache_config.hash_block_size = kv_cache_config.hash_block_size
        self.cache_config.cache_hit_alignment_tokens = kv_cache_config.cache_hit_alignment_tokens
        ensure_kv_transfer_initialized(self.vllm_config, kv_cache_config)

        config = copy.deepcopy(kv_cache_config)
        self._attn_groups, _, kernel_block_sizes = init_attn_backend(config, self.vllm_config, self.device)
        caches = init_kv_cache(
            self.compilation_config.static_forward_context,
            config,
            self.device,
            kernel_block_sizes,
            self.vllm_config,
            attn_groups=(group for groups in self._attn_groups for group in groups),
        )
        block_sizes = [group.kv_cache_spec.block_size for group in config.kv_cache_groups]
        if kernel_block_sizes != block_sizes:
            raise RuntimeError(
                f"token parallelism needs attention kernels that take the KV cache's blocks of {block_sizes} tokens "
                f"whole, but they take {kernel_block_sizes}; set --block-size to that"
            )
        if has_kv_transfer_group():
            get_kv_transfer_group().register_kv_caches(caches)
        self._layers = attention_layers(self.vllm_config)
        self.context.batch = Batch(place, block_sizes, self.model_config.max_model_len, self.device)

    def compile_or_warm_up_model(self) -> CompilationTimes:
        graphs, batch = self.context.graphs, self.context.batch
        if graphs is not None and batch is not None:
            graphs.allocate(batch.max_blocks, self.device)
            graphs.sizes = self._group.broadcast_object(None, src=0)
            max_model_len, dtype = self.model_config.max_model_len, self.model_config.dtype
            self._kv_graphs = KVGraphs(graphs, self._layers, self._attn_groups, max_model_len, dtype)
            with self._getting_ready(), set_forward_context(None, self.vllm_config):
                self._kv_graphs.capture()
        return CompilationTimes(language_model=0.0, encoder=0.0)

    _kv_graphs: KVGraphs | None = None

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    # -- a step --

    def execute_model(self, scheduler_output: Any) -> ModelRunnerOutput | None:
        """Enqueues or does this rank's part of a step. As with vLLM's runner, a step that ran answers in
        `sample_tokens`."""
        try:
            return self._execute(scheduler_output)
        except Exception:
            # vLLM listens to the root's answers, and the root waits for this rank's rows: only the end of this process
            # ends the engine at once.
            logger.exception("token parallelism: the KV worker of rank %d failed in a step", self.context.rank)
            logging.shutdown()
            os._exit(1)

    def _execute(self, scheduler_output: Any) -> ModelRunnerOutput | None:
        if has_kv_transfer_group():
            get_kv_transfer_group().handle_preemptions(scheduler_output.kv_connector_metadata)
        batch = self.context.batch
        assert batch is not None
        batch.update(scheduler_output)
        self._zero_blocks(scheduler_output.new_block_ids_to_zero or ())
        ran = scheduler_output.total_num_scheduled_tokens > 0
        own_requests = batch.scheduled_by_rank()[self.context.rank] if ran else []
        graph_step = self.context.graphs.begin_step(batch) if ran and self.context.graphs is not None else None
        with (
            set_forward_context(None, self.vllm_config),
            KVConnectorModelRunnerMixin.maybe_get_kv_connector_output(scheduler_output) as kv_connector_output,
        ):
            if own_requests:
                with self.context.clock.step():
                    if graph_step is not None and self._kv_graphs is not None:
                        self._kv_graphs.replay(batch, graph_step)
                    else:
                        self._attend(batch.attention_metadata(own_requests))
        output = ModelRunnerOutput.with_kv_conn_output_only(kv_connector_output)
        self._deferred_output = output if ran else None
        return None if ran else output

    _deferred_output: ModelRunnerOutput | None = None

    def sample_tokens(self, grammar_output: Any) -> ModelRunnerOutput:
        output, self._deferred_output = self._deferred_output, None
        return ModelRunnerOutput.with_kv_conn_output_only(None) if output is None else output

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _attend(self, metadata_of_group: list[Any]) -> None:
        """Goes through the attention layers with the root: receive rows, update the cache, attend, send the outputs."""
        metadata = {
            name: built
            for groups, common in zip(self._attn_groups, metadata_of_group, strict=True)
            for group in groups
            for built in (group.get_metadata_builder(0).build_rows(common),)
            for name in group.layer_names
        }
        num_rows = metadata_of_group[0].num_actual_tokens
        transport, clock = self.context.transport, self.context.clock
        dtype = self.model_config.dtype
        for name, layer in self._layers.items():
            layout = RowLayout.of(layer)
            packed = layout.empty_rows(num_rows, dtype, self.device)
            with clock.waiting():
                transport.wait(transport.start(recvs=[(packed, 0)]))
            output = layout.empty_output(num_rows, packed)
            layer.impl.attend_rows(layer, *layout.unpack(packed), metadata[name], output)
            transport.wait(transport.start(sends=[(output, 0)]))

    def _zero_blocks(self, block_ids: Any) -> None:
        assert self.context.batch is not None
        place = self.context.batch.place
        own = [i - place.base for i in block_ids if place.partition.rank_of(i) == place.rank]
        if own:
            for layer in self._layers.values():
                layer.kv_cache[own] = 0

    # -- status --

    def token_parallel_status(self) -> dict[str, Any]:
        """This worker's part of `GET /token_parallel`."""
        status = worker_status(self.context, self._layers, parameter_bytes(list(self._layers.values())))
        return {**status, "ready_seconds": self._ready_seconds}

    def token_parallel_blocks(self) -> dict[str, Any]:
        """Which local blocks were ever written, read from the cache itself, and which its requests ever owned."""
        return block_report(self.context, attention_layers(self.vllm_config))

    def token_parallel_pace(self) -> float | None:
        """Seconds of attention, of all layers, for each KV block; None where steps replay no graphs."""
        return (
            None if self._kv_graphs is None or self.context.batch is None else self._kv_graphs.pace(self.context.batch)
        )

    def set_token_parallel_overlap(self, overlap: Overlap) -> None:
        """As the root's."""
        assert self.context.graphs is not None
        self.context.graphs.overlap = overlap

    # -- calls to all workers of an engine that concern only those with a model --

    def execute_dummy_batch(self) -> None:
        """Nothing to do: a dummy batch has no requests."""

    def take_draft_token_ids(self) -> None:
        """Nothing to give: there is no drafter."""

    def reset_encoder_cache(self) -> None:
        """Nothing to reset."""

    def profile(self, is_start: bool = True, profile_prefix: str | None = None, **bounds: Any) -> None:
        """Writes a trace of its own beside the root's (`--profiler-config`)."""
        if is_start:
            suffix = get_worker_rank_suffix(global_rank=self.rank)
            name = f"{profile_prefix}_{suffix}" if profile_prefix else suffix
            self._profiler = self._profiler or create_worker_profiler(
                self.vllm_config.profiler_config, worker_name=name, local_rank=self.local_rank
            )
            self._profiler.set_output_name(name)
            self._profiler.start(**bounds)
        elif self._profiler is not None:
            self._profiler.stop()

    _profiler: Any = None

    def get_kv_connector_handshake_metadata(self) -> Any:
        """As ModelWorker's."""
        metadata = get_kv_transfer_group().get_handshake_metadata() if has_kv_transfer_group() else None
        return metadata and {(self.context.rank, self.context.shard): metadata}

    def shutdown(self) -> None:
        ensure_kv_transfer_shutdown()
