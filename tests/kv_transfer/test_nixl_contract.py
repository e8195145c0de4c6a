"""What the connector uses of vLLM's NIXL connector, beyond its public interface. A new vLLM fails here first."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_scheduler, base_worker, pull_scheduler, pull_worker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlBaseConnector, NixlPullConnector
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import (
    HeartbeatInfo,
    NixlAgentMetadata,
    NixlConnectorMetadata,
    ReqMeta,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats, NixlPromMetrics
from vllm.distributed.nixl_utils import nixl_agent_config
from vllm.v1.engine.parallel_sampling import ParentRequest

from kv_transfer.metadata import TokenParallelConnectorMetadata
from kv_transfer.metrics import TransferStats
from tests.services.contract import parameters, require, require_all, source

SCHEDULER = "kv_transfer/scheduler.py"
WORKER = "kv_transfer/worker.py"
CONNECTOR = "kv_transfer/connector.py"
METRICS = "kv_transfer/metrics.py"
SHAPES = "kv_transfer/shapes.py"

Worker = pull_worker.NixlPullConnectorWorker
Scheduler = pull_scheduler.NixlPullConnectorScheduler


def test_what_is_to_be_pulled_is_kept_under_this_name_with_the_request_first() -> None:
    allocated = source(Scheduler.update_state_after_alloc)
    require("self._reqs_need_recv[request.request_id] = ( request," in allocated, "_reqs_need_recv", SCHEDULER)
    build = source(Scheduler.build_connector_meta)
    require("self._reqs_need_recv.items()" in build and "self._reqs_need_recv.clear()" in build, "…", SCHEDULER)
    require(
        parameters(Scheduler.update_state_after_alloc) == ["request", "blocks", "num_external_tokens"], "…", SCHEDULER
    )


def test_an_aborted_request_is_told_of_with_no_blocks() -> None:
    require(
        "self._reqs_need_recv[request.request_id] = (request, [], (), False)" in source(Scheduler.request_finished),
        "how a prefill engine hears of an aborted request",
        SCHEDULER,
    )


def test_children_of_a_request_are_named_by_their_index() -> None:
    text = inspect.getsource(ParentRequest)
    require('f"{index}_{self.request_id}"' in text, "names of child requests", SCHEDULER)


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        (Worker.start_load_kv, ["metadata"]),
        (Worker._pop_done_transfers, ["transfers"]),
        (Worker.get_transfer_results, []),
        (Worker.get_block_ids_with_load_errors, []),
    ],
)
def test_overridden_methods_take_these_arguments(method: Any, arguments: list[str]) -> None:
    require(parameters(method) == arguments, f"parameters of {method.__name__}", WORKER)


def test_reading_is_asked_for_by_keyword() -> None:
    require({"request_id", "expected_consumers"} <= set(parameters(Worker._read_blocks)), "_read_blocks", WORKER)
    caller = source(Worker._read_blocks_for_req)
    require("self._read_blocks( read_spec=spec, request_id=req_id," in caller, "how _read_blocks is called", WORKER)
    require("expected_consumers=plan.local_consumers" in caller, "the number of consumers", WORKER)
    require('f"{remote_request_id}:{expected_consumers}"' in source(Worker._read_blocks), "the notification", WORKER)


def test_finished_transfers_are_polled_in_one_place_and_counted_there() -> None:
    results = source(Worker.get_transfer_results)
    require(results.count("self._pop_done_transfers(self._recving_transfers)") == 1, "who polls", WORKER)
    require("self.xfer_stats.record_transfer(res)" in source(Worker._pop_done_transfers), "who counts bytes", WORKER)
    require('data["bytes_transferred"].append' in source(NixlKVConnectorStats.record_transfer), "how", WORKER)


def test_local_blocks_are_logical_until_the_pull_starts() -> None:
    require("local_block_ids" in ReqMeta.__dataclass_fields__, "ReqMeta.local_block_ids", WORKER)
    start = source(Worker.start_load_kv)
    require(
        "meta.local_physical_block_ids = self._logical_to_kernel_block_ids( meta.local_block_ids" in start, "…", WORKER
    )
    require("set(meta.local_block_ids[0])" in source(Worker.get_transfer_results), "ids of failed blocks", WORKER)


def test_a_handshake_is_made_ahead_by_this_method() -> None:
    names = ["engine_id", "host", "port", "tp_size", "dcp_size", "pp_size"]
    sent = source(Worker._send_heartbeats)
    order = [sent.index(f"hb_info.{name}") for name in names[1:]]
    require(order == sorted(order), "the order of _ensure_handshake's arguments", WORKER)
    require('hb_msg = ("HB:" + ",".join(hb_info.req_ids)).encode()' in sent, "a heartbeat that is sent ahead", WORKER)
    require('if msg.startswith("HB:"):' in source(Worker._get_new_notifs), "a heartbeat that is sent ahead", WORKER)
    require_all(set(names[1:]) - set(HeartbeatInfo.__dataclass_fields__), "fields of HeartbeatInfo", WORKER)


def test_the_agent_can_be_replaced_before_anything_is_registered() -> None:
    init = source(base_worker.NixlBaseConnectorWorker.__init__)
    require(init.count("self.nixl_wrapper = nixl_wrapper_cls(str(uuid.uuid4()), config)") == 1, "the agent", WORKER)
    require("self.nixl_wrapper." not in init, "the first agent is used while the worker is made", WORKER)
    require("self.nixl_backends" in init and "self.xfer_stats" in init, "attributes of the worker", WORKER)
    wanted = {"enable_prog_thread", "num_threads", "backends", "capture_telemetry"}
    require_all(wanted - set(inspect.signature(nixl_agent_config).parameters), "the agent's settings", WORKER)


def test_leases_end_in_one_place_and_are_kept_under_these_names() -> None:
    require(
        "self._reap_expired_send_leases(done_sending)" in source(Worker.get_transfer_results), "who ends them", WORKER
    )
    reap = source(Worker._reap_expired_send_leases)
    for text in ("del self._reqs_to_send[req_id]", "self._reqs_to_process.remove(req_id)", "done_sending.add(req_id)"):
        require(text in reap, f"how a lease ends: {text}", WORKER)
    for name in ("consumer_notification_counts_by_req", "expected_consumer_notifications_by_req"):
        require(f"self.{name}.pop(req_id" in reap, name, WORKER)


def test_what_is_registered_before_the_kv_cache_is_told_to_readers_too() -> None:
    register = source(Worker.register_kv_caches)
    require("agent_metadata=self.nixl_wrapper.get_agent_metadata()" in register, "what readers are told", WORKER)
    require("self.xfer_handshake_metadata = NixlHandshakePayload(" in register, "the handshake's payload", WORKER)
    require("self._registered_descs" in source(Worker._finish_shutdown), "who deregisters", WORKER)
    require("encoder.encode(rank_metadata)" in source(Scheduler.set_xfer_handshake_metadata), "who sends it", WORKER)


def test_a_notification_can_wait_until_the_request_is_done() -> None:
    results = source(Worker.get_transfer_results)
    sent, dropped = "self._send_pending_recv_notifs(req_id)", "self._pending_recv_notifs.pop(req_id, None)"
    require(sent in results and dropped in results, "_pending_recv_notifs", WORKER)
    require("for agent_name, notif_id in" in source(Worker._send_pending_recv_notifs), "what waits", WORKER)
    posted = source(Worker._read_blocks)
    require("notif_msg=notif_id" in posted and "make_prepped_xfer(" in posted, "how reads are made", WORKER)


def test_a_request_that_failed_is_reported_when_nothing_is_read_for_it_any_more() -> None:
    results = source(Worker.get_transfer_results)
    require("self._recv_failures.update(newly_failed)" in results, "where failures go", WORKER)
    require("elif req_id not in self._recving_transfers" in results, "when they are reported", WORKER)


def test_orders_are_a_plain_object() -> None:
    made = TokenParallelConnectorMetadata(NixlConnectorMetadata(), {}, {}, idle=True)
    assert vars(NixlConnectorMetadata()), "its fields are not in __dict__ any more; see kv_transfer/metadata.py"
    assert vars(made).keys() - vars(NixlConnectorMetadata()).keys() == {
        "pulls",
        "lease_ids",
        "lease_slots",
        "lease_blocks",
        "idle",
        "step",
        "ended",
        "chunks",
        "keepers",
    }


def test_this_setting_makes_decode_engines_keep_kv() -> None:
    init = source(base_scheduler.NixlBaseConnectorScheduler.__init__)
    require('"bidirectional_kv_xfer"' in init, "the setting that is refused", CONNECTOR)


def test_a_request_that_brings_an_offer_is_pulled_where_the_setting_says_so() -> None:
    matched = source(Scheduler.get_num_new_matched_tokens)
    brought = 'params.get("do_remote_decode") and params.get("remote_block_ids")'
    require(brought in matched and "min(remote_num_tokens, request.num_prompt_tokens)" in matched, "…", SCHEDULER)
    allocated = source(Scheduler.update_state_after_alloc)
    processed = "self.is_bidirectional_kv_xfer_enabled and not params.get("
    require(processed in allocated and 'params["_remote_blocks_processed"] = True' in allocated, "…", SCHEDULER)
    require("self._reqs_in_batch.add(request.request_id)" in allocated, "who is to be kept", SCHEDULER)
    require(hasattr(Scheduler, "_prefill_backoff"), "tokens that a prefill engine leaves out", SCHEDULER)
    alive = source(base_scheduler.NixlBaseConnectorScheduler.on_new_request)
    require("self._heartbeat_req_engine[request.request_id] = (" in alive, "whose leases are kept alive", SCHEDULER)
    finished = source(Scheduler.request_finished)
    require("if is_d_node and not self.is_bidirectional_kv_xfer_enabled:" in finished, "who is not kept", SCHEDULER)


def test_a_worker_keeps_only_what_it_was_told_of_in_a_batch() -> None:
    start = source(Worker.start_load_kv)
    require("self._reqs_to_process.add(req_id)" in start, "requests in a batch", WORKER)
    require("if req_id in self._reqs_to_process:" in start.partition("reqs_to_send.items()")[2], "…", WORKER)


def test_the_side_channel_is_served_by_this_method() -> None:
    require("target=self._nixl_handshake_listener" in source(Scheduler.set_xfer_handshake_metadata), "…", SCHEDULER)
    names = ["encoded_data", "ready_event", "stop_event", "host", "port"]
    require(list(inspect.signature(Scheduler._nixl_handshake_listener).parameters) == names, "…", SCHEDULER)


def test_the_connector_makes_its_halves_itself() -> None:
    init = source(NixlPullConnector.__init__)
    require("Scheduler(" in init and "Worker(" in init, "who makes the halves", CONNECTOR)
    base = source(NixlBaseConnector.__init__)
    require("Scheduler(" not in base and "self.engine_id" in base, "NixlBaseConnector.__init__", CONNECTOR)
    for name in ("get_finished_count", "build_connector_worker_meta", "build_kv_connector_stats", "build_prom_metrics"):
        require(hasattr(KVConnectorBase_V1, name), f"KVConnectorBase_V1.{name}", CONNECTOR)
    for name in ("update_connector_output", "request_finished"):
        require(f"connector_scheduler.{name}(" in source(NixlBaseConnector), f"who calls {name}", SCHEDULER)
    assert base_scheduler.NixlBaseConnectorScheduler in Scheduler.__mro__


def test_statistics_are_lists_by_name_and_metrics_are_made_by_these_classes() -> None:
    require(all(isinstance(v, list) for v in TransferStats().data.values()), "NixlKVConnectorStats.data", METRICS)
    require("accumulator.extend(v)" in source(NixlKVConnectorStats.aggregate), "aggregate", METRICS)
    text = inspect.getsource(NixlPromMetrics)
    require("self._histogram_cls(" in text and "self._counter_cls(" in text, "classes of metrics", METRICS)
    require(parameters(NixlPromMetrics.observe) == ["transfer_stats_data", "engine_idx"], "observe", METRICS)


def test_shapes_are_known_at_these_points_of_the_handshake() -> None:
    require(parameters(Worker._nixl_handshake)[:3] == ["host", "port", "remote_tp_size"], "_nixl_handshake", SHAPES)
    handshake = source(Worker._nixl_handshake)
    checked = handshake.index("self._validate_remote_parallel_config(metadata)")
    require(checked < handshake.index("self.add_remote_agent("), "when the metadata are checked", SHAPES)
    require("block_size" in NixlAgentMetadata.__dataclass_fields__, "NixlAgentMetadata.block_size", SHAPES)


def test_a_lost_connection_is_known_by_this_exception_where_failures_are_handled() -> None:
    from vllm.distributed.nixl_utils import NixlWrapper

    from kv_transfer.worker import _DISCONNECTED

    api: Any = inspect.getmodule(NixlWrapper)
    require(hasattr(api.nixlBind, _DISCONNECTED[0]), f"NIXL's {_DISCONNECTED[0]}", WORKER)
    for method in (Worker._read_blocks, Worker._pop_done_transfers):
        handled = source(method).partition("except Exception")[2]
        require("self._handle_failed_transfer(" in handled, f"who handles failures in {method.__name__}", WORKER)
    require(parameters(Worker._mark_remote_engine_invalid) == ["engine_id", "now"], "its parameters", WORKER)


def test_which_heads_a_worker_pulls_is_what_these_say_when_the_kv_caches_are_registered() -> None:
    made = source(base_worker.NixlBaseConnectorWorker.register_kv_caches)
    require("tp_rank=self.transfer_tp_rank, tp_size=self.transfer_tp_size," in made, "who a worker is", WORKER)
