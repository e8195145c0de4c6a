from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from kv_transfer import idle
from tests.services.contract import VLLM, require


class Engine(SimpleNamespace):
    """An EngineCoreProc as far as its step looks at itself."""

    def __init__(self, executed: bool, unfinished: bool, finished: set[str], queued: Sequence[int] = ()) -> None:
        self.asked: list[bool] = []
        scheduler = SimpleNamespace(
            connector=SimpleNamespace(rest_seconds=self.rest_seconds),
            finished_req_ids=finished,
            has_requests=lambda: True,
            has_unfinished_requests=lambda: unfinished,
            update_from_output=lambda order, result: {order.total_num_scheduled_tokens: result},
        )
        super().__init__(
            vllm_config=SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=1)),
            step_fn=lambda: ({0: "tokens"}, executed),
            output_queue=queue.Queue(),
            input_queue=queue.Queue(),
            post_step=lambda model_executed: None,
            scheduler=scheduler,
            batch_queue=deque(self.batch(num_tokens) for num_tokens in queued),
            log_error_detail=nullcontext,
            _process_aborts_queue=lambda: None,
            _attach_weight_version=lambda outputs: None,
        )

    @staticmethod
    def batch(num_tokens: int) -> tuple[Any, Any, None]:
        """What vLLM keeps of a step in its batch queue, whose newest is the first."""
        result: Future[str] = Future()
        result.set_result("result")
        return result, SimpleNamespace(total_num_scheduled_tokens=num_tokens), None

    def rest_seconds(self, has_unfinished: bool) -> float:
        self.asked.append(has_unfinished)
        return 0.0


def test_vllms_step_is_what_ours_stands_in_for() -> None:
    text = " ".join((VLLM / "v1/engine/core.py").read_text().split())  # the method itself may be ours by now
    body = text.partition("def _process_engine_step(self) -> bool:")[2].partition(" def ")[0]
    for part in (
        "outputs, model_executed = self.step_fn()",
        "for output in outputs.items() if outputs else (): self.output_queue.put_nowait(output)",
        "self.post_step(model_executed)",
        "if not model_executed and self.scheduler.has_requests(): time.sleep(0.001)",
        "return model_executed",
    ):
        require(part in body, f"a step's {part!r}", "kv_transfer/idle.py")
    require(body.count("self.") == 4, "the parts of a step", "kv_transfer/idle.py")
    body = text.partition("def step_with_batch_queue(")[2].partition(" def ")[0]
    for part in (
        "batch_queue.appendleft((future, scheduler_output, exec_future))",
        "future, scheduler_output, exec_model_fut = batch_queue.pop()",
        "model_output = future.result()",
        "self._process_aborts_queue() engine_core_outputs = self.scheduler.update_from_output( scheduler_output, "
        "model_output ) self._attach_iteration_details(engine_core_outputs, iteration_details) "
        "self._attach_weight_version(engine_core_outputs)",
    ):
        require(part in body, f"a queued step's {part!r}", "kv_transfer/idle.py")


@pytest.mark.parametrize(
    ("executed", "unfinished", "finished", "asked"),
    [
        (True, True, set(), []),
        (False, True, set(), [True]),
        (False, False, set(), [False]),
        (False, False, {"a"}, []),  # its blocks are offered with the next step
    ],
)
def test_only_a_step_that_computed_nothing_is_followed_by_a_rest(
    executed: bool, unfinished: bool, finished: set[str], asked: list[bool]
) -> None:
    engine: Any = Engine(executed, unfinished, finished)
    assert idle._process_engine_step(engine) is executed
    assert engine.output_queue.get_nowait() == (0, "tokens")
    assert engine.asked == asked


@pytest.mark.parametrize(
    ("queued", "looked_at", "left"),
    [
        ((), [], 0),
        ((0,), [0], 0),
        ((0, 0), [0, 0], 0),
        ((0, 7), [], 2),  # vLLM waits for the one that computes when it has something to queue behind it
        ((7,), [], 1),
    ],
)
def test_the_result_of_a_step_that_computed_nothing_is_looked_at_at_once(
    queued: tuple[int, ...], looked_at: list[int], left: int
) -> None:
    engine: Any = Engine(False, True, set(), queued)
    idle._process_engine_step(engine)
    found = [engine.output_queue.get_nowait() for _ in range(engine.output_queue.qsize())]
    assert found == [(0, "tokens"), *((num_tokens, "result") for num_tokens in looked_at)]
    assert len(engine.batch_queue) == left


def test_data_parallel_engines_do_not_wait_for_one_that_rests() -> None:
    engine: Any = Engine(executed=False, unfinished=False, finished=set())
    engine.vllm_config.parallel_config.data_parallel_size = 2
    assert idle._process_engine_step(engine) is False
    assert engine.asked == []


def test_a_rest_ends_with_the_first_request() -> None:
    requests: queue.Queue[str] = queue.Queue()
    threading.Timer(0.05, requests.put, ["request"]).start()
    begin = time.monotonic()
    idle.rest(requests, 60)
    assert time.monotonic() - begin < 30
    idle.rest(requests, 60)  # it was not taken yet
    assert time.monotonic() - begin < 30
    assert requests.get_nowait() == "request"


def test_a_rest_ends_when_it_is_over() -> None:
    idle.rest(queue.Queue(), 0.001)


def test_an_engine_whose_connector_knows_nothing_of_rests_goes_on() -> None:
    engine: Any = Engine(executed=False, unfinished=True, finished=set())
    engine.scheduler.connector = object()
    assert idle._process_engine_step(engine) is False
    assert engine.asked == []
