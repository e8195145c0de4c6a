"""Where the engines of `tknp serve --ray` run: prefill engines on nodes of a running Ray cluster, each in a bundle of
its own, decode engines here, with their ranks wherever vLLM's Ray executor finds room for them."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any

from tknp.launch.options import CannotServeError
from tknp.launch.places import Place
from tknp.launch.ports import choose_ports

if TYPE_CHECKING:
    from collections.abc import Sequence

_PLACEMENT_SECONDS = 60.0


def ray_places(prefill_needs: Sequence[int], decode_needs: Sequence[int], namespace: str) -> list[Place]:
    """Reserves GPUs for the prefill engines, until this process ends. Their places come first.

    Args:
        prefill_needs, decode_needs: GPUs of each engine; on CPU, what Ray's nodes were given as `--num-gpus`.
        namespace: in which those who start the engines find the placement group.

    Raises:
        CannotServeError: there is no cluster to be found, or it has too few GPUs.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise CannotServeError("--ray needs Ray on every node: pip install -e '.[ray]'") from error
    try:
        address = os.environ.get("RAY_ADDRESS") or "auto"
        ray.init(address=address, namespace=namespace, log_to_driver=False, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise CannotServeError(
            "--ray needs a running Ray cluster with this machine in it: `ray start --head` on one, `ray start "
            "--address=<it>` on the others; RAY_ADDRESS names one of several"
        ) from error
    needed, free = sum(prefill_needs) + sum(decode_needs), int(ray.available_resources().get("GPU", 0))
    if needed > free:
        raise CannotServeError(
            f"these engines need {needed} GPUs and {free} of the Ray cluster are free; ask for fewer replicas or a "
            "smaller --token-parallel-size or --tensor-parallel-size, or add nodes"
        )
    group = ray.util.placement_group([{"GPU": need} for need in prefill_needs], name=namespace)
    if not group.wait(_PLACEMENT_SECONDS):
        raise CannotServeError(
            f"Ray found no nodes for prefill engines of {', '.join(map(str, prefill_needs))} GPUs within "
            f"{_PLACEMENT_SECONDS:.0f} s; an engine needs all of its GPUs on one node"
        )
    here: str = ray.util.get_node_ip_address()
    decode = [_place(here, choose_ports(2, here)) for _ in decode_needs]
    return [*(_place_in(group, bundle, need, namespace) for bundle, need in enumerate(prefill_needs)), *decode]


def _place_in(group: Any, bundle: int, num_gpus: int, namespace: str) -> Place:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
    look = ray.remote(_look_round).options(num_cpus=0, num_gpus=num_gpus, scheduling_strategy=strategy)
    address, ports = ray.get(look.remote())
    launcher = (sys.executable, "-m", "tknp.launch.ray_engine", namespace, str(bundle), str(num_gpus))
    return _place(address, ports, launcher)


def _look_round() -> tuple[str, list[int]]:
    """On the node: its address, and two free ports."""
    import ray

    address: str = ray.util.get_node_ip_address()
    return address, choose_ports(2, address)


def _place(address: str, ports: Sequence[int], launcher: tuple[str, ...] = (sys.executable,)) -> Place:
    import ray

    cluster = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    return Place(address, ports[0], ports[1], launcher, {"VLLM_HOST_IP": address, **cluster})
