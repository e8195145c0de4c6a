"""What replaying FULL CUDA graphs relies on in vLLM. No GPU is needed to see whether it is still there."""

from __future__ import annotations

from vllm.config import CUDAGraphMode
from vllm.config.compilation import PassConfig
from vllm.distributed.device_communicators.cuda_communicator import CudaCommunicator
from vllm.distributed.device_communicators.custom_all_reduce import CustomAllreduce
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder
from vllm.v1.executor.abstract import Executor
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager, ModelCudaGraphManager
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from tests.services.contract import VLLM, calls, parameters, require, source


def test_a_decode_step_replays_the_smallest_graph_that_holds_it() -> None:
    dispatch = source(CudaGraphManager.dispatch)
    require("for desc in self._candidates[key]" in dispatch, "how graphs are chosen", "GraphSizes.size_for")
    names = {"cg_mode", "num_tokens", "uniform_token_count"}
    known = set(BatchExecutionDescriptor.__dataclass_fields__)
    require(names <= known, "BatchExecutionDescriptor's fields", "graph_setup.captured_sizes")
    require(
        "self.graphs[desc] = graph" in source(CudaGraphManager.capture), "manager.graphs", "worker.token_parallel_pace"
    )
    require(
        "self.graphs[desc].replay()" in source(CudaGraphManager.run_fullgraph), "how one is replayed", "EitherGraph"
    )
    again = source(CudaGraphManager.release_graphs)
    require("self.graphs.clear()" in again, "release_graphs()", "either_graph.capturing_both")
    warm_up = source(Worker.compile_or_warm_up_model)
    require("self.model_runner.capture_model()" in warm_up, "how a worker captures", "RootWorker")
    estimate = source(Worker.determine_available_memory)
    require(
        "self.cudagraph_memory_estimate = " in estimate, "the graphs' memory", "RootWorker.determine_available_memory"
    )
    require(CUDAGraphMode.FULL_AND_PIECEWISE.decode_mode() == CUDAGraphMode.FULL, "decode_mode()", "graph_setup")


def test_a_prompt_s_last_token_counts_as_a_decode_unless_it_is_the_only_one() -> None:
    gather = source(GPUModelRunner.gather_batch_req_state)
    rule = "one_token_ext = (num_new_tokens == 1) & (num_computed_prefill_tokens_np > 0)"
    require(rule in gather, "which steps count as decodes", "Batch.is_decode")


def test_the_captured_forward_calls_the_runner_s_model_within_a_forward_context() -> None:
    capture = source(ModelCudaGraphManager.capture)
    require("set_forward_context( attn_metadata," in capture, "the capture's forward context", "GraphModel.forward")
    require("model_output = model(**model_inputs)" in capture, "how a capture runs the model", "GraphModel.forward")
    require(
        "self.cudagraph_manager.capture( self.model," in source(GPUModelRunner.capture_model), "the model", "GraphModel"
    )


def test_capture_and_replay_ask_the_builder_for_metadata() -> None:
    path = "v1/worker/gpu/attn_utils.py"
    require(any(calls(path, "build_metadata_for_cudagraph_capture")), "metadata for capture", "TokenParallelBuilder")
    require(any(calls(path, "build_metadata")), "metadata for a step", "TokenParallelBuilder.build")
    values = [support.value for support in (AttentionCGSupport.NEVER, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE)]
    require(values == [0, 1], "the order of AttentionCGSupport", "TokenParallelBuilder.get_cudagraph_support")


def test_flash_attention_s_plan_takes_a_margin_of_multiprocessors() -> None:
    given = parameters(FlashAttentionMetadataBuilder._get_scheduler_metadata)
    wanted = {"aot_schedule", "batch_size", "cu_query_lens", "max_query_len", "seqlens", "max_seq_len", "causal"}
    require(set(given) == wanted | {"max_num_splits"}, "FlashAttention's planning", "splits.splitting")
    build = source(FlashAttentionMetadataBuilder.build)
    require("self._get_scheduler_metadata( aot_schedule=aot_schedule," in build, "when it plans", "splits.splitting")
    require("_store_scheduler_metadata(scheduler_metadata)" in build, "where a plan is kept", "splits.splitting")
    # Only the CUDA build has it, so its source is looked at.
    planner = (VLLM / "vllm_flash_attn/flash_attn_interface.py").read_text().split("def get_scheduler_metadata(")[1]
    require("sm_margin=0" in planner.split("):")[0], "get_scheduler_metadata's sm_margin", "splits.splitting")
    require("get_scheduler_metadata" in source(fa_utils), "where get_scheduler_metadata comes from", "splits.splitting")


def test_graphs_are_captured_before_the_scheduler_is_made() -> None:
    path = "v1/engine/core.py"
    require(any(calls(path, "compile_or_warm_up_model")), "when the engine core warms up", "TokenParallelExecutor")
    require(not parameters(Executor.compile_or_warm_up_model), "compile_or_warm_up_model", "TokenParallelExecutor")


def test_a_second_custom_all_reduce_can_stand_beside_vllm_s_own() -> None:
    options = {"max_size", "max_all_gather_size", "max_mnnvl_all_gather_size", "max_reduce_scatter_size"}
    options |= {"max_mnnvl_reduce_scatter_size", "register_graph_buffers", "group", "device"}
    require(options <= set(parameters(CustomAllreduce.__init__)), "CustomAllreduce's options", "all_reduce._second")
    reduce = source(CudaCommunicator.all_reduce)
    require("ca_comm = self.ca_comm if (" in reduce, "where vLLM looks for it", "all_reduce.AllReduceOfEach")
    require("and ca_comm.should_custom_ar(input_)" in reduce, "what vLLM asks it", "all_reduce.AllReduceOfEach")
    before = reduce.split("ca_comm = self.ca_comm")[0].split("self.")
    asked = {name.split()[0].split(".")[0].rstrip(",)") for name in before[1:]}
    known = {"fi_ar_comm", "pynccl_comm", "qr_comm", "fi_pcie_ipc_ar_comm", "use_aiter_allreduce", "aiter_ar_comm"}
    require(asked == known, f"what comes before the custom all-reduce: {sorted(asked)}", "all_reduce.install")
    capture = source(GroupCoordinator.graph_capture)
    require("maybe_ca_context = ca_comm.capture()" in capture, "how captures are bracketed", "AllReduceOfEach.capture")
    require("fuse_allreduce_rms" in PassConfig.__dataclass_fields__, "the fusion's name", "all_reduce")
