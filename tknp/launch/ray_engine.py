"""Runs one command on a node of a Ray cluster, and ends with it.

    python -m tknp.launch.ray_engine <namespace> <bundle> <number of GPUs> -m tknp prefill ...

The bundle is one of the placement group that is named like the namespace. What the command writes is written here too,
by Ray. SIGINT or SIGTERM ends the command in order, a second one at once. When this process is killed, Ray ends the
actor, and with it the command and all that it started.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys

# Settings of the engines, which count on every node. Paths and addresses of this machine do not.
_CARRIED = ("VLLM_", "HF_", "UCX_", "NCCL_", "OMP_", "DO_NOT_TRACK", "NO_COLOR", "PYTHONUNBUFFERED")
_OF_A_NODE = ("VLLM_HOST_IP", "VLLM_NIXL_SIDE_CHANNEL_HOST")

# Otherwise Ray kills the guard when the actor ends, and whatever the guard has not ended yet stays for ever: it kills
# children, and not theirs (docs.ray.io, "Lifetimes of a User-Spawn Process"). The guard itself hears of the actor's
# end.
_LEAVE_THE_GUARD = {"env_vars": {"RAY_kill_child_processes_on_worker_exit": "0"}}


class Engine:
    """A Ray actor."""

    def __init__(self, words: list[str], environment: dict[str, str]) -> None:
        """Starts `python <words>` on this node."""
        import ray

        guard = [sys.executable, "-m", "tknp.launch.guard", str(os.getpid())]
        own = {"VLLM_HOST_IP": ray.util.get_node_ip_address()}
        self._guard = subprocess.Popen([*guard, sys.executable, *words], env={**os.environ, **environment, **own})

    def wait(self) -> int:
        """The exit code."""
        return self._guard.wait()

    def stop(self) -> None:
        self._guard.terminate()


def main() -> None:
    namespace, bundle, num_gpus, *words = sys.argv[1:]

    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    ray.init(address=os.environ["RAY_ADDRESS"], namespace=namespace, logging_level=logging.WARNING)
    group = ray.util.get_placement_group(namespace)
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=int(bundle))
    options = {
        "num_cpus": 0,
        "num_gpus": int(num_gpus),
        "max_concurrency": 2,
        "scheduling_strategy": strategy,
        "runtime_env": _LEAVE_THE_GUARD,
    }
    environment = {k: v for k, v in os.environ.items() if k.startswith(_CARRIED) and k not in _OF_A_NODE}
    actor = ray.remote(Engine).options(**options).remote(words, environment)
    ended = actor.wait.remote()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = None
    try:
        while code is None:
            try:
                code = ray.get(ended)
            except KeyboardInterrupt:
                actor.stop.remote()
    except ray.exceptions.RayActorError:
        ray.shutdown()  # which says much; what counts comes last
        sys.exit("this engine is gone: its Ray actor has died, or the node it was on; see `ray status`")
    sys.exit(code)


if __name__ == "__main__":
    main()
