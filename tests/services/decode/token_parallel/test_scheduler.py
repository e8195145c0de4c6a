from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from services.decode.token_parallel.engine_state import get_engine_state
from services.decode.token_parallel.scheduler import (
    AsyncTokenParallelScheduler,
    RunningRequests,
    TokenParallelScheduler,
)
from tests.services.building import Stepper, kv_cache_config, request, scheduler, tiny_config
from tknp.common.partition import set_partition


@pytest.fixture(scope="module")
def config(llama: Path) -> Any:
    return tiny_config(llama)


class Ranks:
    """The part of the manager that decides about victims; a stand-in, because the real one only starves when full."""

    def __init__(self, starved: int | None, **ranks: int) -> None:
        self.starved_rank = starved
        self._ranks = ranks

    def rank_of(self, request_id: str) -> int | None:
        return self._ranks.get(request_id)


def running(names: str, starved: int | None, **ranks: int) -> RunningRequests:
    manager: Any = Ranks(starved, **ranks)
    return RunningRequests([SimpleNamespace(request_id=name) for name in names], manager)


def test_the_last_of_the_starved_rank_is_the_victim() -> None:
    requests = running("abcd", 0, a=0, b=0, c=1, d=1)
    assert requests[-1].request_id == "b"
    assert requests.pop().request_id == "b"
    assert [r.request_id for r in requests] == ["a", "c", "d"]
    assert requests.pop().request_id == "a"
    assert [r.request_id for r in requests] == ["c", "d"]


def test_without_a_starved_rank_it_is_a_list_like_any_other() -> None:
    requests = running("abcd", None, a=0, b=0, c=1, d=1)
    assert requests[-1].request_id == "d"
    assert requests[0].request_id == "a"
    assert [r.request_id for r in requests[1:3]] == ["b", "c"]
    assert requests.pop(0).request_id == "a"
    assert requests.pop().request_id == "d"


def test_other_indices_mean_what_they_say_also_while_a_rank_starves() -> None:
    requests = running("abcd", 0, a=0, b=0, c=1, d=1)
    assert [requests[i].request_id for i in range(4)] == list("abcd")
    assert requests[-2].request_id == "c"
    assert requests.pop(3).request_id == "d"


def test_vllm_s_own_reassignment_keeps_the_choice_of_victims(config: Any) -> None:
    plan = scheduler(config, (9, 9))
    plan.running = [SimpleNamespace(request_id="x")]
    assert isinstance(plan.running, RunningRequests)
    assert plan.running._manager is plan.kv_cache_manager


def test_which_class_decides_about_async_scheduling() -> None:
    assert issubclass(AsyncTokenParallelScheduler, AsyncScheduler)
    assert issubclass(TokenParallelScheduler, Scheduler)
    assert not issubclass(TokenParallelScheduler, AsyncScheduler)


def test_the_executor_finds_the_scheduler_s_pools(config: Any) -> None:
    plan = scheduler(config, (9, 20))
    state = get_engine_state()
    assert state is not None
    assert state.kv_cache_manager is plan.kv_cache_manager
    assert state.connector is None


def test_without_the_executor_s_partition_it_refuses_to_start(config: Any) -> None:
    scheduler(config, (9, 20))
    set_partition(None)
    with pytest.raises(RuntimeError, match="needs the token-parallel executor"):
        TokenParallelScheduler(
            vllm_config=config,
            kv_cache_config=kv_cache_config(29),
            structured_output_manager=None,
            block_size=32,
        )


def test_the_victim_lives_on_the_rank_that_ran_out_and_may_come_back_on_another(config: Any) -> None:
    plan = scheduler(config, (14, 17))
    stepper = Stepper(plan)
    for i in range(10):
        plan.add_request(request(f"r{i}", range(100 * i, 100 * i + 40), max_tokens=60 + 35 * (i % 4)))
    victims: list[int] = []
    preempt = plan._preempt_request

    def watched(victim: Any, *args: Any, **kwargs: Any) -> None:
        rank = plan.kv_cache_manager.rank_of(victim.request_id)
        assert rank == plan.kv_cache_manager.starved_rank
        victims.append(rank)
        preempt(victim, *args, **kwargs)

    plan._preempt_request = watched
    places: dict[str, set[int]] = {}
    while plan.has_unfinished_requests():
        stepper.step()
        assert stepper.num_steps < 2000
        for name in plan.requests:
            rank = plan.kv_cache_manager.rank_of(name)
            if rank is not None:
                places.setdefault(name, set()).add(rank)
    assert set(victims) == {0, 1}, "each rank must have run out, or this test shows nothing"
    assert any(len(ranks) == 2 for ranks in places.values())
    assert plan.kv_cache_manager.free_blocks_per_rank() == [13, 16]


def test_aborts_in_every_state_give_all_blocks_back(config: Any) -> None:
    rng = random.Random(3)
    plan = scheduler(config, (11, 15))
    stepper = Stepper(plan)
    seen: set[RequestStatus] = set()
    for i in range(400):
        if i < 300 and len(plan.requests) < 14:
            prompt = range(100 * i, 100 * i + rng.randint(1, 120))
            plan.add_request(request(f"r{i}", prompt, max_tokens=rng.randint(1, 200)))
        if rng.random() < 0.3 and plan.requests:
            victim = rng.choice(list(plan.requests))
            seen.add(plan.requests[victim].status)
            plan.finish_requests(victim, RequestStatus.FINISHED_ABORTED)
        stepper.step()
    stepper.finish()
    assert seen == {RequestStatus.WAITING, RequestStatus.RUNNING, RequestStatus.PREEMPTED}
    assert plan.kv_cache_manager.free_blocks_per_rank() == [10, 14]
    assert not plan.kv_cache_manager._owner


def test_a_reset_that_preempts_everybody_ends_well(config: Any) -> None:
    plan = scheduler(config, (20, 20))
    stepper = Stepper(plan)
    for i in range(4):
        plan.add_request(request(f"r{i}", range(100 * i, 100 * i + 50), max_tokens=20))
    for _ in range(5):
        stepper.step()
    assert plan.reset_prefix_cache(reset_running_requests=True)
    assert plan.kv_cache_manager.free_blocks_per_rank() == [19, 19]
    stepper.finish()
    assert plan.kv_cache_manager.free_blocks_per_rank() == [19, 19]


def test_reservations_of_prefills_in_flight_count_on_their_own_rank_only(config: Any) -> None:
    plan = scheduler(config, (40, 40))
    stepper = Stepper(plan)
    # A prompt longer than a step's budget stays in flight.
    plan.add_request(request("long", range(400), max_tokens=4))
    stepper.step()
    rank = plan.kv_cache_manager.rank_of("long")
    assert rank == 1
    plan.kv_cache_manager.placing_rank = 1
    assert plan._inflight_prefill_reserved_blocks() == 13 - 2
    plan.kv_cache_manager.placing_rank = 0
    assert plan._inflight_prefill_reserved_blocks() == 0


def test_a_starved_rank_does_not_stop_the_others_for_long(config: Any) -> None:
    plan = scheduler(config, (9, 60))
    stepper = Stepper(plan)
    for i in range(5):
        plan.add_request(request(f"r{i}", range(100 * i, 100 * i + 100), max_tokens=150))
    idle = 0
    while plan.has_unfinished_requests():
        output = stepper.step()
        idle = 0 if output.total_num_scheduled_tokens else idle + 1
        assert idle <= 1
        assert stepper.num_steps < 2000
