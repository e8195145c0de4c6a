"""Where the engines of `tknp serve --ray` run: those that need one node on any of a running Ray cluster's, each in a
bundle of its own; those whose ranks may be on several, here, with a placement group for their ranks."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from typing import TYPE_CHECKING, Any

from tknp.common.ports import choose_ports
from tknp.launch.options import CannotServeError
from tknp.launch.places import Place

if TYPE_CHECKING:
    from collections.abc import Sequence

_PLACEMENT_SECONDS = 60.0
_PLACEMENT_HERE_SECONDS = 5.0  # what fits is placed within one


def ray_places(on_one_node: Sequence[int], of_ranks: Sequence[int]) -> list[Place]:
    """Reserves GPUs for all engines, until this process ends.

    Args:
        on_one_node, of_ranks: GPUs of each engine; on CPU, what Ray's nodes were given as `--num-gpus`.

    Returns:
        The places of `on_one_node`, then those of `of_ranks`.

    Raises:
        CannotServeError: there is no cluster to be found, or it has too few GPUs.
    """
    namespace = f"tknp-{uuid.uuid4().hex[:8]}"
    _connect(namespace)
    needed, free = sum(on_one_node) + sum(of_ranks), _free_gpus()
    if needed > free:
        raise CannotServeError(
            f"these engines need {needed} GPUs and {free} of the Ray cluster are free; ask for fewer replicas or a "
            "smaller --token-parallel-size or --tensor-parallel-size, or add nodes"
        )
    # First what is better off here: anything else can be anywhere.
    ranks = [_place_of_ranks(need, namespace, str(index)) for index, need in enumerate(of_ranks)]
    return [*_places_on_one_node(on_one_node, namespace), *ranks]


def _connect(namespace: str) -> None:
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


def _free_gpus() -> int:
    import ray

    return int(ray.available_resources().get("GPU", 0))


def _place_of_ranks(num_gpus: int, namespace: str, name: str) -> Place:
    """Here, with bundles of one GPU each for the ranks: the first one here too if there is room, so that rank 0 shares
    a node with the scheduler."""
    import ray

    here: str = ray.util.get_node_ip_address()
    bundles = [{"GPU": 1.0} for _ in range(num_gpus)]
    pinned = [{**bundles[0], f"node:{here}": 0.001}, *bundles[1:]]
    group = ray.util.placement_group(pinned, "PACK", name)
    if not group.wait(_PLACEMENT_HERE_SECONDS):
        ray.util.remove_placement_group(group)
        group = ray.util.placement_group(bundles, "PACK", name)
        if not group.wait(_PLACEMENT_SECONDS):
            raise CannotServeError(f"Ray found no {num_gpus} GPUs for the ranks of an engine: see `ray status`")
    return _place(here, choose_ports(2, here), environment={"TKNP_RAY_GROUP": f"{namespace}/{name}"})


def _places_on_one_node(needs: Sequence[int], namespace: str) -> list[Place]:
    import ray

    group = ray.util.placement_group([{"GPU": need} for need in needs], name=namespace)
    if not group.wait(_PLACEMENT_SECONDS):
        raise CannotServeError(
            f"Ray found no nodes for engines of {', '.join(map(str, needs))} GPUs within {_PLACEMENT_SECONDS:.0f} s; "
            "an engine needs all of its GPUs on one node, but for the token-parallel ranks of a decode engine"
        )
    return [_place_in(group, bundle, need, namespace) for bundle, need in enumerate(needs)]


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


def _place(
    address: str,
    ports: Sequence[int],
    launcher: tuple[str, ...] = (sys.executable,),
    environment: dict[str, str] | None = None,
) -> Place:
    import ray

    cluster = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, **(environment or {})}
    return Place(address, ports[0], ports[1], launcher, {"VLLM_HOST_IP": address, **cluster})
