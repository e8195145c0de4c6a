"""What executor and workers use of vLLM, beyond its public interface. A new vLLM fails here first."""

from __future__ import annotations

import ast
import inspect
from typing import Any

import pytest
from vllm.distributed import parallel_state
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.forward_context import set_forward_context
from vllm.v1.core import kv_cache_utils
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProc, WorkerProcHandle
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheTensor
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.worker import gpu_worker
from vllm.v1.worker.gpu import attn_utils
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin
from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase, WorkerWrapperBase

from services.decode.token_parallel.executor import TokenParallelExecutor
from services.decode.token_parallel.kv_worker import KVWorker
from services.decode.token_parallel.ranks_as_one import RanksAsOne
from services.decode.token_parallel.worker import RootWorker
from tests.services.contract import calls, parameters, require, require_all, source

EXECUTOR = "services/decode/token_parallel/executor.py"
WORKER = "services/decode/token_parallel/worker.py"
KV_WORKER = "services/decode/token_parallel/kv_worker.py"
GROUP = "services/decode/token_parallel/group.py"

REFUSED = {
    "sleep": "sleep mode is refused at start; level 0, which the benchmark uses, reaches no worker",
    "wake_up": "sleep mode is refused at start; level 0, which the benchmark uses, reaches no worker",
    "discard": "sleep mode is refused at start",
    "elastic_ep_execute": "elastic expert parallelism is refused at start",
    "reinitialize_distributed": "elastic expert parallelism; of the Ray executor only",
    "adjust_rank": "of the Ray executor only",
    "init_worker": "of the Ray executor only",
    "update_environment_variables": "of the Ray executor only",
    "save_sharded_state": "a KV worker has no weights; the call fails, the engine goes on",
    "compute_weight_checksums": "a KV worker has no weights; the call fails, the engine goes on",
    "checkpoint_prepare": "not offered by the decode service",
    "checkpoint_restore": "not offered by the decode service",
    "init_weight_transfer_engine": "weight updates are not offered by the decode service",
    "shutdown_weight_transfer_engine": "weight updates are not offered by the decode service",
    "start_weight_update": "weight updates are not offered by the decode service",
    "start_draft_weight_update": "weight updates are not offered by the decode service",
    "update_weights": "weight updates are not offered by the decode service",
    "finish_weight_update": "weight updates are not offered by the decode service",
    "reset_weights": "weight updates are not offered by the decode service",
}
"""Calls to all workers that a KV worker does not answer, and why that is right."""

EXECUTOR_HOOKS = {
    "_init_executor": [],
    "_get_parallel_sizes": [],
    "_get_output_rank": [],
    "start_worker_monitor": ["inline"],
    "get_kv_cache_specs": [],
    "get_supported_kv_cache_layouts": [],
    "determine_available_memory": [],
    "initialize_from_config": ["kv_cache_configs"],
    "shutdown": [],
}


def called_on_all_workers() -> set[str]:
    names: set[str] = set()
    for path in ("v1/engine", "v1/executor", "entrypoints"):
        for call in calls(path, "collective_rpc"):
            method = call.args[0] if call.args else next((k.value for k in call.keywords if k.arg == "method"), None)
            if isinstance(method, ast.Constant) and isinstance(method.value, str):
                names.add(method.value)
    return names


def test_a_kv_worker_answers_every_call_to_all_workers_or_it_is_known_why_not() -> None:
    called = called_on_all_workers()
    assert {"execute_model", "sample_tokens", "initialize_from_config"} <= called, "the scan finds nothing any more"
    unanswered = {name for name in called if not hasattr(KVWorker, name)}
    require_all(unanswered - REFUSED.keys(), "it calls on all workers", KV_WORKER)
    assert not (REFUSED.keys() & called) - unanswered, "on the list of refused calls, but answered"
    require_all(REFUSED.keys() - called, "it no longer calls", "REFUSED, in this file,")


@pytest.mark.parametrize("name", sorted(called_on_all_workers() & vars(KVWorker).keys()))
def test_a_kv_worker_takes_the_arguments_that_the_root_takes(name: str) -> None:
    theirs, ours = inspect.signature(getattr(RootWorker, name)), inspect.signature(getattr(KVWorker, name))
    if not any(p.kind is p.VAR_KEYWORD for p in (*ours.parameters.values(), *theirs.parameters.values())):
        assert list(ours.parameters) == list(theirs.parameters), f"{name} moved; see {KV_WORKER}"


@pytest.mark.parametrize("name", EXECUTOR_HOOKS)
def test_the_executor_s_hooks_exist_as_they_are_overridden(name: str) -> None:
    require(hasattr(MultiprocExecutor, name), f"MultiprocExecutor.{name} is gone", EXECUTOR)
    require(parameters(getattr(MultiprocExecutor, name)) == EXECUTOR_HOOKS[name], f"parameters of {name}", EXECUTOR)
    assert name in vars(TokenParallelExecutor) | vars(RanksAsOne), "an override that is gone; take it off the list"


def test_the_executor_sizes_everything_by_the_configured_world() -> None:
    sizes = source(MultiprocExecutor._get_parallel_sizes)
    require("self.world_size = self.parallel_config.world_size" in sizes, "where world_size comes from", EXECUTOR)
    init = source(MultiprocExecutor._init_executor)
    require("tp_size * pp_size * pcp_size" in init, "the check of the world size", EXECUTOR)
    require("self.start_worker_monitor()" in init, "who starts the monitor", EXECUTOR)
    require("self.output_rank = self._get_output_rank()" in init, "who takes the tokens", EXECUTOR)


def test_several_nodes_are_a_matter_of_the_parallel_config_that_workers_get() -> None:
    init = source(MultiprocExecutor._init_executor) + source(MultiprocExecutor._get_parallel_sizes)
    for name in ("node_rank_within_dp == 0", "parallel_config.local_world_size", "peer_worker_response_mqs"):
        require(name in init, f"{name} in _init_executor", EXECUTOR)
    require("parallel_config.nnodes > 1" in source(parallel_state.init_distributed_environment), "nnodes", EXECUTOR)
    from vllm.entrypoints.cli.serve import run_headless

    headless = source(run_headless)
    for call in ("monitor_workers=False", "start_worker_monitor(inline=True)", "headless=True"):
        require(call in headless, f"{call} in run_headless", "services/decode/token_parallel/headless.py")


def test_the_ray_executor_is_a_multiproc_executor_with_these_hooks() -> None:
    pytest.importorskip("ray")
    from vllm.v1.executor.ray_executor_v2 import RayExecutorV2, RayWorkerHandle

    relied_on_by = "services/decode/token_parallel/ray_executor.py"
    require(issubclass(RayExecutorV2, MultiprocExecutor), "RayExecutorV2's base", relied_on_by)
    require("copy.deepcopy(dict(base))" in source(RayExecutorV2._build_runtime_env), "runtime_env", relied_on_by)
    require({"rank", "node_id"} <= set(RayWorkerHandle.__dataclass_fields__), "RayWorkerHandle", relied_on_by)
    monitor = source(RayExecutorV2.start_worker_monitor)
    require("executor.failure_callback" in monitor, "who is told of a dead actor", relied_on_by)


def test_the_executor_s_state_of_death_is_known_by_these_names() -> None:
    monitor = source(MultiprocExecutor.start_worker_monitor)
    for name in ("h.proc.sentinel", "shutting_down", "is_failed = True"):
        require(name in monitor, f"{name} in start_worker_monitor", EXECUTOR)
    require({"rank", "proc"} <= set(WorkerProcHandle.__dataclass_fields__), "WorkerProcHandle", EXECUTOR)


def test_calls_go_through_collective_rpc_with_these_arguments() -> None:
    expected = ["method", "timeout", "args", "kwargs"]
    require(parameters(MultiprocExecutor.collective_rpc)[:4] == expected, "collective_rpc's parameters", EXECUTOR)
    from vllm.v1.engine.core import EngineCore

    require(
        "self.model_executor.collective_rpc(method, timeout, args, kwargs)" in source(EngineCore.collective_rpc),
        "how the engine core passes a call on",
        EXECUTOR,
    )


def test_a_failed_worker_that_is_not_the_output_rank_stays_silent() -> None:
    # Why a KV worker that cannot go on must end itself: nobody would hear of it.
    require(
        "if output_rank is None or self.rank == output_rank: self.handle_output(e)"
        in source(WorkerProc._execute_worker_rpc),
        "who reports an exception of a worker",
        KV_WORKER,
    )


def test_kv_transfer_is_complete_when_the_owner_s_workers_have_reported() -> None:
    count = source(KVOutputAggregator.from_connector)
    require("connector.get_finished_count() or world_size" in count, "the count of reports", "kv_transfer/connector.py")
    require("self.parallel_config.world_size" in source(Executor.init_kv_output_aggregator), "…", EXECUTOR)
    aggregate = source(KVOutputAggregator.aggregate)
    require("assert model_runner_output is not None" in aggregate, "every worker must answer", KV_WORKER)
    require("kv_connector_worker_meta.aggregate(" in aggregate, "joining of reports", "kv_transfer/metadata.py")


def test_blocks_are_planned_by_these_functions() -> None:
    plan = kv_cache_utils.get_kv_cache_config_from_groups
    require(parameters(plan) == ["vllm_config", "kv_cache_groups", "available_memory"], "the planner", EXECUTOR)
    room = kv_cache_utils.get_max_concurrency_for_kv_cache_config
    require(parameters(room) == ["vllm_config", "kv_cache_config"], "the check of the longest request", EXECUTOR)
    fields: Any = KVCacheConfig.__dataclass_fields__
    copied = {"num_blocks", "kv_cache_tensors", "kv_cache_groups", "kv_cache_layout", "hash_block_size"}
    copied |= {"cache_hit_alignment_tokens", "kv_tp_replicas"}
    require_all(copied - set(fields), "fields of KVCacheConfig", EXECUTOR)
    planned = {"prefix_cache_retention_interval"}  # by get_kv_cache_config_from_groups itself
    require_all(
        {n for n in fields if not n.startswith("hisparse_")} - copied - planned, "new fields of KVCacheConfig", EXECUTOR
    )
    require("size" in KVCacheTensor.__dataclass_fields__, "KVCacheTensor.size", EXECUTOR)
    # The size of a tensor is that of all layers together, from which the bytes of a block are taken.
    require("size = bytes_per_block * num_blocks" in source(plan), "what KVCacheTensor.size counts", EXECUTOR)


def test_workers_are_made_by_calling_the_configured_class() -> None:
    init = source(WorkerWrapperBase.init_worker)
    require("worker_class(**kwargs)" in init, "how a worker is made", WORKER)
    names = ["vllm_config", "local_rank", "rank", "distributed_init_method", "is_driver_worker"]
    require(parameters(WorkerBase.__init__) == names, "parameters of WorkerBase", WORKER)


def test_what_a_kv_worker_is_built_from_exists() -> None:
    require(
        parameters(attn_utils.init_attn_backend)[:3] == ["kv_cache_config", "vllm_config", "device"], "…", KV_WORKER
    )
    caches = parameters(attn_utils.init_kv_cache)
    require(
        caches[:5] == ["forward_context", "kv_cache_config", "device", "kernel_block_sizes", "vllm_config"]
        and "attn_groups" in caches,
        "parameters of init_kv_cache",
        KV_WORKER,
    )
    names = ["vllm_config", "rank", "distributed_init_method", "local_rank", "backend"]
    require(parameters(gpu_worker.init_worker_distributed_environment) == names, "…", KV_WORKER)
    require(parameters(set_forward_context)[:2] == ["attn_metadata", "vllm_config"], "set_forward_context", KV_WORKER)
    require(
        parameters(KVConnectorModelRunnerMixin.maybe_get_kv_connector_output)[:1] == ["scheduler_output"],
        "the connector's frame of a step",
        KV_WORKER,
    )
    assert CompilationTimes(language_model=0.0, encoder=0.0)
    assert ModelRunnerOutput.with_kv_conn_output_only(None) is EMPTY_MODEL_RUNNER_OUTPUT


def test_groups_of_workers_are_made_by_this_function() -> None:
    names = {"group_ranks", "local_rank", "backend", "group_name", "use_device_communicator"}
    require_all(names - set(parameters(parallel_state.init_model_parallel_group)), "its parameters", GROUP)
    require_all(
        (n for n in ("broadcast_object",) if not hasattr(parallel_state.GroupCoordinator, n)), "GroupCoordinator", GROUP
    )
    text = source(parallel_state.GroupCoordinator.__init__)
    for name in ("self.ranks", "self.rank_in_group", "self.cpu_group", "self.device_communicator"):
        require(name in text, f"GroupCoordinator sets {name}", GROUP)
    # T*P workers in a world of T: vLLM's own groups come out per token-parallel rank.
    require("ExternalDP" in source(parallel_state.initialize_model_parallel), "the world's outermost dimension", GROUP)


@pytest.mark.parametrize("path", ["v1/worker/gpu_model_runner.py", "v1/worker/gpu/model_runner.py"])
def test_the_root_s_rows_are_named_by_the_runner(path: str) -> None:
    from tests.services.contract import VLLM

    text = (VLLM / path).read_text() + (VLLM / "v1/worker/gpu/states.py").read_text()
    name = "input_batch.req_ids" if path.endswith("gpu_model_runner.py") else "index_to_req_id"
    require(name in text, f"{name} in {path}", WORKER)
