"""What scheduler and block pools use of vLLM, beyond its public interface. A new vLLM fails here first."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

import pytest
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from services.decode.token_parallel.kv_cache_manager import PartitionedKVCacheManager
from services.decode.token_parallel.scheduler import _TokenParallelMixin
from tests.services.building import partitioned_manager
from tests.services.contract import VLLM, attributes_of, parameters, require, require_all, source, syntax_tree
from tknp.common.versions import VLLM_VERSION, check_vllm_version

SCHEDULER = "services/decode/token_parallel/scheduler.py"
MANAGER = "services/decode/token_parallel/kv_cache_manager.py"
BATCH = "services/decode/token_parallel/batch.py"
SCHEDULER_SOURCES = ("v1/core/sched/scheduler.py", "v1/core/sched/async_scheduler.py", "v1/engine/core.py")


def keywords_of_manager_in(function: Any) -> dict[str, str]:
    """Keyword arguments of `KVCacheManager(...)` in a method, with the expressions that are passed."""
    tree = syntax_tree(textwrap.dedent(inspect.getsource(function)))
    call = next(n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "KVCacheManager")
    return {k.arg: ast.unparse(k.value) for k in call.keywords if k.arg}


def test_the_version_is_the_one_that_these_tests_were_written_for() -> None:
    check_vllm_version()
    import vllm

    require(vllm.__version__.split("+")[0] == VLLM_VERSION, f"its version is {vllm.__version__}", "tknp/common")


def test_block_managers_are_made_like_the_scheduler_s_own() -> None:
    theirs = keywords_of_manager_in(Scheduler.__init__)
    ours = keywords_of_manager_in(_TokenParallelMixin._make_manager)
    # In Scheduler.__init__ some are still parameters or locals.
    same = {"hash_block_size": "self.hash_block_size", "max_in_flight_tokens": "self.vllm_config.max_in_flight_tokens"}
    assert {**theirs, **same} == {**ours}, f"KVCacheManager's arguments in Scheduler.__init__ moved; see {SCHEDULER}"
    require(set(ours) == set(parameters(KVCacheManager.__init__)), "parameters of KVCacheManager.__init__", SCHEDULER)


@pytest.mark.parametrize("path", SCHEDULER_SOURCES)
def test_all_that_vllm_asks_of_the_manager_is_answered(path: str) -> None:
    asked = attributes_of(path, "kv_cache_manager")
    manager = partitioned_manager((4, 4))
    require_all((n for n in asked if not hasattr(manager, n)), f"{path} asks the KV cache manager for", MANAGER)


@pytest.mark.parametrize("path", SCHEDULER_SOURCES)
def test_all_that_vllm_asks_of_the_coordinator_is_the_same_on_every_rank_or_routed(path: str) -> None:
    # What holds for one rank holds for all: sizes and flags. Anything else must go to the rank of a request.
    known = {"enable_partial_hash_hits", "single_type_managers", "get_num_blocks_to_allocate"}
    require_all(attributes_of(path, "coordinator") - known, f"{path} asks the coordinator for", MANAGER)


def test_all_that_vllm_asks_of_the_pool_is_right_for_blocks_of_any_rank() -> None:
    require_all(attributes_of(SCHEDULER_SOURCES[0], "block_pool") - {"free_blocks"}, "uses of the block pool", MANAGER)


def test_methods_take_what_vllm_s_take() -> None:
    for name, method in inspect.getmembers(PartitionedKVCacheManager, inspect.isfunction):
        theirs = getattr(KVCacheManager, name, None)
        if name.startswith("_") or theirs is None:
            continue
        ours = inspect.signature(method).parameters
        if any(p.kind is p.VAR_KEYWORD for p in ours.values()):
            continue
        assert list(ours) == list(inspect.signature(theirs).parameters), f"KVCacheManager.{name} moved; see {MANAGER}"


def test_lookups_return_what_the_wrapper_takes_apart() -> None:
    manager = partitioned_manager((4, 4)).managers[0]
    from tests.services.building import request

    require(len(manager.get_computed_blocks(request("r", range(9)))) == 3, "get_computed_blocks", MANAGER)
    require(len(manager.get_computed_blocks_for_connector(request("r", range(9)))) == 4, "…_for_connector", MANAGER)
    require(len(manager.take_kv_cache_block_copies()) == 2, "take_kv_cache_block_copies", MANAGER)


def test_a_pool_passes_the_blocks_of_another_on() -> None:
    require("pool" in KVCacheBlock.__dataclass_fields__, "KVCacheBlock.pool", MANAGER)
    require("block.pool is not self" in source(BlockPool.free_blocks), "BlockPool.free_blocks redirects", MANAGER)
    pools = [rank.block_pool for rank in partitioned_manager((4, 4)).managers]
    taken = pools[1].get_new_blocks(2)
    pools[0].free_blocks(taken)
    assert [pool.get_num_free_blocks() for pool in pools] == [3, 3]


def test_evicting_indexes_blocks_by_a_rank_s_own_ids() -> None:
    require("self.blocks[block_id]" in source(BlockPool.evict_blocks), "BlockPool.evict_blocks", MANAGER)


def test_victims_are_the_last_of_the_running_requests() -> None:
    schedule = source(Scheduler.schedule)
    require("preempted_req = self.running[-1]" in schedule, "which running request is looked at", SCHEDULER)
    require("preempted_req = self.running.pop()" in schedule, "which running request is preempted", SCHEDULER)
    require("request = self.running[req_index]" in schedule, "how running requests are gone through", SCHEDULER)
    text = (VLLM / SCHEDULER_SOURCES[0]).read_text()
    require(text.count("self.running[-1]") == 1, "another use of self.running[-1]", SCHEDULER)
    require(text.count("self.running.pop(") == 2, "uses of self.running.pop", SCHEDULER)
    assert "self.running.pop(" in source(Scheduler.reset_prefix_cache), "the second pop, which empties the list"


def test_running_is_reassigned_with_plain_lists() -> None:
    text = (VLLM / SCHEDULER_SOURCES[0]).read_text()
    require(text.count("self.running = remove_all(self.running,") == 2, "self.running is reassigned", SCHEDULER)
    require("self.running" not in source(AsyncScheduler), "AsyncScheduler touches self.running", SCHEDULER)


def test_a_request_is_looked_up_right_before_reservations_are_counted() -> None:
    schedule = source(Scheduler.schedule)
    lookup = schedule.index("self._get_local_prefix_cache_hit(request)")
    require(
        lookup < schedule.index("self._inflight_prefill_reserved_blocks()") < schedule.index("has_scheduled_reqs="),
        "the order of prefix lookup, reservation and allocation",
        SCHEDULER,
    )
    require("load_kv_async" in schedule, "loads that wait", SCHEDULER)
    require(parameters(Scheduler._request_remaining_blocks) == ["request"], "_request_remaining_blocks", SCHEDULER)
    require(parameters(Scheduler._inflight_prefill_reserved_blocks) == [], "_inflight_prefill_reserved", SCHEDULER)
    require("self._inflight_prefills" in source(Scheduler._inflight_prefill_reserved_blocks), "its sum", SCHEDULER)


def test_a_running_request_without_blocks_is_asked_for_in_running_state() -> None:
    require("RequestStatus.RUNNING" in source(Scheduler._preempt_request), "victims are running", MANAGER)


def test_preempted_requests_are_placed_again() -> None:
    preempt = source(Scheduler._preempt_request)
    require("self._free_request_blocks(request)" in preempt, "a preemption frees all blocks", MANAGER)
    require("request.num_computed_tokens = 0" in preempt, "a preempted request is looked up again", MANAGER)


def declarations(tree: ast.AST) -> set[str]:
    found = (n.target for n in ast.walk(tree) if isinstance(n, ast.AnnAssign) and n.value is None)
    return {target.id for target in found if isinstance(target, ast.Name)}


def test_the_attributes_that_the_scheduler_reads_exist() -> None:
    wanted = declarations(syntax_tree(inspect.getsource(_TokenParallelMixin))) - {"kv_cache_manager", "_running"}
    assert len(wanted) > 10, "the declarations under TYPE_CHECKING are not found any more"
    text = (VLLM / SCHEDULER_SOURCES[0]).read_text()
    require_all((n for n in wanted if f"self.{n}" not in text), "attributes of Scheduler", SCHEDULER)


def test_the_fields_that_batches_are_replayed_from_exist() -> None:
    used = {
        SchedulerOutput: "finished_req_ids preempted_req_ids scheduled_new_reqs scheduled_cached_reqs "
        "num_scheduled_tokens total_num_scheduled_tokens new_block_ids_to_zero kv_connector_metadata",
        NewRequestData: "req_id block_ids num_computed_tokens",
        CachedRequestData: "req_ids new_block_ids num_computed_tokens resumed_req_ids",
    }
    for owner, names in used.items():
        fields: Any = owner.__dataclass_fields__
        require_all(set(names.split()) - set(fields), f"fields of {owner.__name__}", BATCH)


def test_nothing_else_in_a_step_s_output_speaks_of_block_ids() -> None:
    # Whatever carries ids must be rebased for KV workers and cut for the root (worker.py, kv_worker.py).
    known = {
        "new_block_ids_to_zero",
        "kv_cache_block_copies",  # of Mamba layers
        "kv_connector_block_state",  # stays in the scheduler's process
        "num_common_prefix_blocks",  # counts
    }
    fields: Any = SchedulerOutput.__dataclass_fields__
    carriers = {name for name in fields if "block" in name}
    require_all(
        carriers ^ known, "fields of SchedulerOutput with block ids", "services/decode/token_parallel/worker.py"
    )
