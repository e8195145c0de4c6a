"""What streaming uses of vLLM, beyond what tests/kv_transfer/test_nixl_contract.py holds."""

from __future__ import annotations

import dataclasses
import inspect

from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker, pull_worker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import ReqMeta
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.tp_mapping import TPMapping
from vllm.model_executor.layers.attention import attention, kv_transfer_utils
from vllm.v1.core.sched.output import CachedRequestData, KVConnectorBlockState, NewRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from tests.services.contract import require, require_all, source

SOURCE = "kv_transfer/stream_source.py"
LAYERS = "kv_transfer/layer_source.py"
WORKER = "kv_transfer/streaming_worker.py"

Worker = pull_worker.NixlPullConnectorWorker


def test_orders_are_made_before_the_step_counts_as_computed() -> None:
    schedule = source(Scheduler.schedule)
    made, counted = (
        schedule.index(name) for name in ("self._build_kv_connector_meta(", "self._update_after_schedule(")
    )
    require(made < counted, "num_computed_tokens are those before the step", SOURCE)
    require("preempted_req_ids=" in schedule, "who was preempted", SOURCE)
    for kind, names in (
        (SchedulerOutput, {"preempted_req_ids", "kv_connector_block_state", "num_scheduled_tokens"}),
        (CachedRequestData, {"req_ids", "num_computed_tokens", "resumed_req_ids"}),
        (NewRequestData, {"req_id", "num_computed_tokens"}),
    ):
        require_all(names - {one.name for one in dataclasses.fields(kind)}, f"{kind.__name__}'s fields", SOURCE)
    require("resolve_block_ids(req_id)" in source(KVConnectorBlockState.get_block_ids), "a request's blocks", SOURCE)


def test_a_request_s_end_is_heard_of_before_its_step_is() -> None:
    update = source(Scheduler.update_from_output)
    ended, heard = (update.index(name) for name in ("self._handle_stopped_request(", "self._update_from_kv_xfer_fini"))
    require(ended < heard, "the order of request_finished and update_connector_output", SOURCE)


def test_blocks_of_an_aborted_pull_are_kept_until_the_worker_reports_it() -> None:
    finish = source(Scheduler.finish_requests)
    require("request.status == RequestStatus.WAITING_FOR_REMOTE_KVS: delay_free_blocks" in finish, "…", WORKER)
    require(
        "assert RequestStatus.is_finished(req.status) self._free_blocks"
        in source(Scheduler._update_from_kv_xfer_finished),
        "who frees them",
        WORKER,
    )


def test_a_hook_follows_each_layer_s_attention() -> None:
    hook = source(kv_transfer_utils.maybe_transfer_kv_layer)
    computed, saved = (hook.index(name) for name in ("result = func(", "connector.save_kv_layer(layer_name"))
    require(computed < saved and "has_connector_metadata()" in hook, "when it is called", LAYERS)
    text = " ".join(inspect.getsource(attention).split())
    require("@maybe_transfer_kv_layer def unified_attention_with_output(" in text, "what it is called for", LAYERS)


def test_pages_are_listed_region_by_region() -> None:
    ids = source(Worker._compute_desc_ids)
    require("(region_offsets[:, None] + block_arr).ravel()" in ids, "the order of pages", "kv_transfer/lease_check.py")
    require("self.region_names.append(layer_name)" in source(Worker.register_kv_caches), "regions' names", LAYERS)


def test_a_pull_can_be_made_of_parts() -> None:
    wanted = {"local_block_ids", "local_physical_block_ids", "local_num_computed_blocks", "remote", "awaiting_kvs"}
    require_all(wanted - {one.name for one in dataclasses.fields(ReqMeta)}, "ReqMeta's fields", WORKER)
    require("all_source_ranks" in {one.name for one in dataclasses.fields(TPMapping)}, "TPMapping", WORKER)
    read = source(Worker._read_blocks_for_req)
    require("self._recving_transfers.setdefault(req_id, [])" in read, "parts of a request are kept together", WORKER)
    results = source(base_worker.NixlBaseConnectorWorker.get_transfer_results)
    require("elif req_id not in self._recving_transfers:" in results, "failures wait for what is under way", WORKER)
    trim = source(base_worker.NixlBaseConnectorWorker._apply_prefix_caching)
    require("prefill_group[-num_decode_blocks:]" in trim, "blocks are paired from their ends", WORKER)
