"""What an engine does after a step that computed nothing. A patch of vLLM, since nothing public reaches there.

vLLM's engine goes on stepping while a request waits for its KV cache or a lease is held, and sleeps 1 ms after each
such step (v1/engine/core.py, `_process_engine_step`). With async scheduling it also looks at the result of such a step
only behind the next one, so that two sleeps and a step lie between the last byte of a pull and the first decode step.
An engine with our connector looks at once, and rests for as long as the connector says, or until somebody asks it for
something. What that saves: docs/performance.md.
"""

from __future__ import annotations

import queue
from typing import Any

_VLLM_SECONDS = 0.001


def install() -> None:
    """For this process's engine."""
    from vllm.v1.engine.core import EngineCoreProc

    EngineCoreProc._process_engine_step = _process_engine_step


def _process_engine_step(core: Any) -> bool:
    """As vLLM's, but for the results and the rest."""
    outputs, model_executed = core.step_fn()
    _put(core, outputs)
    while core.batch_queue and not core.batch_queue[-1][1].total_num_scheduled_tokens:
        _put(core, _oldest_result(core))
    core.post_step(model_executed)
    scheduler = core.scheduler
    # The workers have not heard yet of a request that has just finished.
    if not model_executed and scheduler.has_requests() and not scheduler.finished_req_ids:
        # Ours may be one of several in vLLM's MultiConnector, which knows nothing of rests. And data-parallel engines
        # of a model with experts wait for one another in each step.
        seconds = getattr(scheduler.connector, "rest_seconds", lambda _: _VLLM_SECONDS)
        is_alone = core.vllm_config.parallel_config.data_parallel_size == 1
        rest(core.input_queue, seconds(scheduler.has_unfinished_requests()) if is_alone else _VLLM_SECONDS)
    return bool(model_executed)


def _put(core: Any, outputs: dict[int, Any] | None) -> None:
    for output in outputs.items() if outputs else ():
        core.output_queue.put_nowait(output)


def _oldest_result(core: Any) -> dict[int, Any]:
    """Of a step that computed nothing: as the second half of EngineCore.step_with_batch_queue, but for the details of
    an iteration, of which it has none."""
    future, scheduler_output, _ = core.batch_queue.pop()
    with core.log_error_detail(scheduler_output):
        model_output = future.result()
    core._process_aborts_queue()
    outputs: dict[int, Any] = core.scheduler.update_from_output(scheduler_output, model_output)
    core._attach_weight_version(outputs)
    return outputs


def rest(requests: queue.Queue[Any], seconds: float) -> None:
    """Until there is a request, but not longer than that."""
    with requests.not_empty:
        if not requests.queue:
            requests.not_empty.wait(seconds)
