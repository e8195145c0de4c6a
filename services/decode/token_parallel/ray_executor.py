"""Token-parallel ranks as Ray actors, one for each bundle of a placement group, on as many nodes as that takes.

vLLM's Ray executor with message queues (v1/executor/ray_executor_v2.py) does all of it: it orders bundles by node, the
engine core's own first, so that the root is where the scheduler is if there is an accelerator.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2

from services.decode.token_parallel.nodes import prefer_interface_of
from services.decode.token_parallel.ranks_as_one import RanksAsOne, end_engine_core

logger = init_logger(f"vllm.{__name__}")

_HOOK = "worker_process_setup_hook"


class RayTokenParallelExecutor(RanksAsOne, RayExecutorV2):
    """`tknp decode --distributed-executor-backend ray` selects it."""

    def _start_workers(self) -> None:
        prepare_process()
        environment = dict(self.parallel_config.ray_runtime_env or {})
        if _HOOK in environment:
            raise ValueError(f"token parallelism needs {_HOOK} of Ray's runtime environment for itself; leave it out")
        self.parallel_config.ray_runtime_env = {**environment, _HOOK: f"{__name__}.prepare_actor"}
        if group := os.environ.get("TKNP_RAY_GROUP"):
            self.parallel_config.placement_group = reserved_group(group, self.parallel_config.ray_runtime_env)
        super()._start_workers()
        for handle in self.ray_worker_handles:
            logger.info("token parallelism: the %s is on Ray node %s", self._describe(handle.rank), handle.node_id)

    def _build_runtime_env(self) -> dict[str, Any]:
        environment: dict[str, Any] = super()._build_runtime_env()
        environment.pop(_HOOK)  # Ray takes it for a whole job only
        return environment

    def register_failure_callback(self, callback: Callable[[], None]) -> None:
        def end() -> None:
            logger.error(
                "token parallelism: a rank's Ray actor has died; its number stands above. Its KV cache is lost, so "
                "this engine stops; its requests can be retried on another decode engine."
            )
            end_engine_core()

        # vLLM's own callback would only be heard between two steps.
        super().register_failure_callback(end)


def reserved_group(name: str, runtime_env: dict[str, Any]) -> Any:
    """The placement group `<namespace>/<name>`, in which `tknp serve --ray` keeps room for the ranks."""
    import ray

    namespace, _, name = name.partition("/")
    ray.init(namespace=namespace, runtime_env=runtime_env)  # of the cluster that RAY_ADDRESS names
    return ray.util.get_placement_group(name)


def prepare_process() -> None:
    """On CPU, has vLLM take Ray's GPUs for places of ranks: it knows no device of a CPU that Ray counts. Start Ray's
    nodes with as many `--num-gpus` as they may hold ranks."""
    if current_platform.is_cpu():
        current_platform.ray_device_key = "GPU"


def prepare_actor() -> None:
    """Ray calls this in each of its worker processes before an actor is made there."""
    import ray

    prepare_process()
    prefer_interface_of(ray.util.get_node_ip_address())
    os.environ.setdefault("VLLM_HOST_IP", ray.util.get_node_ip_address())
