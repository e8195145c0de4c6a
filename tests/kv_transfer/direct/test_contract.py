"""What the direct path uses of vLLM's NIXL connector and of NIXL's agent. A new version fails here first."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_scheduler, base_worker, pull_worker
from vllm.distributed.nixl_utils import NixlWrapper

from kv_transfer.direct.agent import DirectAgent
from kv_transfer.packed.agent import PackedAgent
from tests.services.contract import parameters, require, source

AGENT, PATH, METRICS = "kv_transfer/detour.py", "kv_transfer/path.py", "kv_transfer/metrics.py"

Worker: Any = pull_worker.NixlPullConnectorWorker


@pytest.mark.parametrize(
    "name",
    [
        "get_xfer_descs",
        "prep_xfer_dlist",
        "release_dlist_handle",
        "make_prepped_xfer",
        "transfer",
        "check_xfer_state",
        "get_xfer_telemetry",
        "release_xfer_handle",
        "remove_remote_agent",
        "send_notif",
    ],
)
def test_the_agent_has_these_methods(name: str) -> None:
    require(callable(getattr(NixlWrapper, name, None)), name, AGENT)


@pytest.mark.parametrize("kind", [DirectAgent, PackedAgent])
def test_what_stands_in_the_agents_place_has_its_parameters(kind: type[Any]) -> None:
    own = {name for name, member in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")}
    for name in own - {"connect", "disconnect", "is_connected", "settle"}:
        ours, theirs = (parameters(getattr(one, name)) for one in (kind, NixlWrapper))
        given = [one for one in ours if one not in ("args", "kwargs")]
        require(given == theirs[: len(given)], f"parameters of {name}", AGENT)


def test_pages_are_prepared_and_read_in_this_way() -> None:
    local = source(Worker.register_local_xfer_handler)
    require("self.nixl_wrapper.get_xfer_descs(blocks_data, mem_type)" in local, "the local list", AGENT)
    require('self.nixl_wrapper.prep_xfer_dlist("NIXL_INIT_AGENT", descs)' in local, "the local list's agent", AGENT)
    remote = source(Worker.add_remote_agent)
    require("self.nixl_wrapper.prep_xfer_dlist(remote_agent_name, descs)" in remote, "the remote list", AGENT)
    read = source(Worker._read_blocks)
    require('make_prepped_xfer( "READ", local_xfer_side_handle, local_block_descs_ids,' in read, "the read", AGENT)


def test_a_peer_s_state_is_released_without_reads_under_way() -> None:
    cleanup = source(Worker._cleanup_remote_engine)
    require("self.nixl_wrapper.remove_remote_agent(agent_name)" in cleanup, "who forgets a peer", AGENT)
    require("_engines_with_inflight_transfers()" in source(Worker._cleanup_remote_engines), "when", AGENT)


def test_the_handshake_can_be_repeated_and_returns_the_agents_names() -> None:
    handshake = source(Worker._nixl_handshake)
    require("return remote_rank_to_agent_name, best_offset" in handshake, "what _nixl_handshake returns", PATH)
    require("(GET_META_MSG, remote_pp_rank, remote_rank)" in handshake, "the question", PATH)
    listener = source(base_scheduler.NixlBaseConnectorScheduler._nixl_handshake_listener)
    require('(identity, b"", encoded_data[(target_pp_rank, target_tp_rank)], ts)' in listener, "the answer", PATH)
    require("agent_metadata_bytes=encoder.encode(agent_metadata)" in source(Worker.register_kv_caches), "…", PATH)


def test_blocks_are_not_given_to_a_pull_while_a_step_may_write_to_them() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    require("self.defer_block_free = True" in source(Scheduler.__init__), "who waits for steps in flight", AGENT)


def test_telemetry_is_read_by_these_names() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats

    record = source(NixlKVConnectorStats.record_transfer)
    for name in ("xferDuration", "postDuration", "totalBytes", "descCount"):
        require(f"res.{name}" in record, name, METRICS)
    assert base_worker.NixlBaseConnectorWorker in Worker.__mro__
