"""The worker class that vLLM starts in every process of a token-parallel engine (`--worker-cls`)."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Any

from vllm import envs
from vllm.platforms import current_platform
from vllm.v1.core.kv_cache_utils import get_kv_cache_groups

from services.decode.token_parallel.batch import Batch, max_blocks
from services.decode.token_parallel.context import TokenParallelContext
from services.decode.token_parallel.either_graph import capturing_both
from services.decode.token_parallel.graph_setup import captured_sizes, make_graph_model, make_graphs
from services.decode.token_parallel.graphs import Graphs
from services.decode.token_parallel.grid import WorkerGrid
from services.decode.token_parallel.group import join_group
from services.decode.token_parallel.kv_worker import KVWorker
from services.decode.token_parallel.layers import attention_layers, describe_layers
from services.decode.token_parallel.options import TokenParallelOptions
from services.decode.token_parallel.overlap import Overlap, RootPace
from services.decode.token_parallel.pace import root_pace
from services.decode.token_parallel.status import block_report, worker_status
from services.kv_peers import KVBothWorker
from tknp.common.partition import RankPlace, set_place

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


class TokenParallelWorker:
    """Makes a `KVWorker` where there are to be no weights, and else a `RootWorker` or a `SpreadWorker`: vLLM takes one
    class for all of them."""

    def __new__(cls, vllm_config: Any, local_rank: int, rank: int, *args: Any, **kwargs: Any) -> Any:
        grid = WorkerGrid.of(vllm_config)
        with_model = SpreadWorker if grid.is_spread else RootWorker
        chosen = with_model if rank < grid.num_known else KVWorker
        return chosen(vllm_config, local_rank, rank, *args, **kwargs)


class ModelWorker(KVBothWorker, PlatformWorker):
    """vLLM's own worker, with attention layers that know that not all requests live on this rank."""

    context: TokenParallelContext

    def init_device(self) -> None:
        super().init_device()
        self._group, self.context = join_group(self.vllm_config, self.local_rank)

    def _make_graphs(self) -> Graphs | None:
        layers = attention_layers(self.vllm_config)
        self.context.graphs = make_graphs(self.vllm_config, self._group, layers, self.device)
        return self.context.graphs

    def determine_available_memory(self) -> int:
        if self.context.graphs is not None:
            # vLLM captures some graphs here, to see what memory they take, before the KV cache exists.
            self._know_groups(get_kv_cache_groups(self.vllm_config, self.get_kv_cache_spec()))
        return int(super().determine_available_memory())

    def _know_groups(self, groups: list[Any]) -> None:
        block_sizes = [group.kv_cache_spec.block_size for group in groups]
        group_of = {name: i for i, group in enumerate(groups) for name in group.layer_names}
        layers = attention_layers(self.vllm_config)
        self.context.group_of_layer = {
            name: group_of[layer.kv_sharing_target_layer_name or name] for name, layer in layers.items()
        }
        if self.context.graphs is not None:
            self.context.graphs.allocate(max_blocks(block_sizes, self.model_config.max_model_len), self.device)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        place = RankPlace(self.context.rank, kv_cache_config.token_parallel_partition, self.context.shard)
        set_place(place)
        groups = kv_cache_config.kv_cache_groups
        self._know_groups(groups)
        super().initialize_from_config(kv_cache_config)
        self.context.batch = Batch(
            place,
            [group.kv_cache_spec.block_size for group in groups],
            self.model_config.max_model_len,
            self.device,
        )
        self.context.row_request_ids = self._row_request_ids

    def _row_request_ids(self, common_attn_metadata: Any) -> list[str]:
        runner = self.model_runner
        if self.use_v2_model_runner:
            ids = runner.req_states.index_to_req_id
            return [ids[i] for i in common_attn_metadata.req_idx.tolist()]
        return list(runner.input_batch.req_ids)

    def compile_or_warm_up_model(self) -> Any:
        # Model Runner V2 warms up by executing invented SchedulerOutputs (v1/worker/gpu/warmup.py), which concern
        # nobody else.
        self._warming_up = True
        try:
            times = super().compile_or_warm_up_model()
        finally:
            self._warming_up = False
        if (graphs := self.context.graphs) is not None:
            graphs.sizes = captured_sizes(self.model_runner.cudagraph_manager, graphs.sizes)
        return times

    _warming_up = False

    def execute_model(self, scheduler_output: Any) -> Any:
        if self._warming_up:
            return super().execute_model(scheduler_output)
        assert self.context.batch is not None
        self.context.batch.update(scheduler_output)
        scheduler_output = self._own_block_work(scheduler_output)
        if not scheduler_output.total_num_scheduled_tokens:
            return super().execute_model(scheduler_output)
        with self.context.live_step():
            return super().execute_model(scheduler_output)

    def _own_block_work(self, scheduler_output: Any) -> Any:
        """Leaves out the blocks to zero that lie on other ranks."""
        to_zero = scheduler_output.new_block_ids_to_zero
        if not to_zero:
            return scheduler_output
        assert self.context.batch is not None
        place = self.context.batch.place
        own = [i - place.base for i in to_zero if place.partition.rank_of(i) == place.rank]
        return dataclasses.replace(scheduler_output, new_block_ids_to_zero=own)

    def get_kv_connector_handshake_metadata(self) -> Any:
        """By (token-parallel rank, shard), as kv_transfer.rank_offers takes it."""
        found = super().get_kv_connector_handshake_metadata()
        return found and dict.fromkeys([(self.context.rank, self.context.shard)], *found.values())

    def token_parallel_status(self) -> dict[str, Any]:
        """This worker's part of `GET /token_parallel`."""
        model = self.model_runner.get_model()
        parameters = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        return worker_status(self.context, attention_layers(self.vllm_config), parameters)

    def token_parallel_blocks(self) -> dict[str, Any]:
        """See `KVWorker.token_parallel_blocks`."""
        return block_report(self.context, attention_layers(self.vllm_config))


class RootWorker(ModelWorker):
    """Has the whole model of its tensor-parallel rank, and sends the rows of other ranks' requests to KV workers."""

    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        self._group.broadcast_object(describe_layers(self.vllm_config), src=0)
        if (graphs := self._make_graphs()) is not None:
            layers = attention_layers(self.vllm_config)
            self.model_runner.model = make_graph_model(self.vllm_config, self.model_runner.model, graphs, layers)

    @property
    def _both_from(self) -> int | None:
        """Rows from which there are to be graphs with one micro-batch and with two: where nobody has said when steps
        overlap, they choose. None if there is nothing to choose."""
        graphs = self.context.graphs
        is_said = TokenParallelOptions.of(self.vllm_config).overlap_from is not None
        return None if graphs is None or is_said else graphs.sizes.overlap_from

    def determine_available_memory(self) -> int:
        available = super().determine_available_memory()
        if self._both_from is None or not envs.VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS:
            return available
        # vLLM has left room for graphs of one kind.
        return available - int(getattr(self, "cudagraph_memory_estimate", 0))

    def compile_or_warm_up_model(self) -> Any:
        graphs, both_from = self.context.graphs, self._both_from
        if graphs is None:
            return super().compile_or_warm_up_model()
        both = nullcontext() if both_from is None else capturing_both(self.model_runner, graphs, both_from)
        with both:
            times = super().compile_or_warm_up_model()
        self._group.broadcast_object(graphs.sizes, src=0)
        return times

    def token_parallel_pace(self) -> RootPace | None:
        """Of decode steps in which this root does not attend; None if they never overlap, since the others then wait
        for it anyway."""
        graphs = self.context.graphs
        if graphs is None or self.model_runner.cudagraph_manager is None:
            return None
        captured = self.model_runner.cudagraph_manager.graphs
        return root_pace(graphs.sizes, captured, len(attention_layers(self.vllm_config)))

    def set_token_parallel_overlap(self, overlap: Overlap) -> None:
        """By what the root's steps, and with them all others', are divided."""
        assert self.context.graphs is not None
        self.context.graphs.overlap = overlap


class SpreadWorker(ModelWorker):
    """Has a part of the model, as all others do, and trades query heads and outputs with those that have its KV heads
    (spread.py)."""

    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        self._make_graphs()

    def token_parallel_pace(self) -> None:
        """All ranks compute the same, so placement has nothing to make up for."""
