"""Where an engine runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from tknp.common.devices import visible_devices
from tknp.common.ports import choose_ports
from tknp.launch.devices import assign_devices


@dataclass(frozen=True)
class Place:
    """Where one engine runs.

    Attributes:
        address: of its machine, as the router and other engines reach it.
        port, side_channel_port: free there.
        launcher: the words in front of `-m tknp ...` that start it there.
        environment: what differs from this process's.
    """

    address: str
    port: int
    side_channel_port: int
    launcher: tuple[str, ...] = (sys.executable,)
    environment: Mapping[str, str] = field(default_factory=dict)


def local_places(needs: list[int], cpu: bool) -> list[Place]:
    """Places on this machine for engines that need so many GPUs each.

    Raises:
        CannotServeError: there are not enough of them.
    """
    ports = iter(choose_ports(2 * len(needs)))
    devices = [[] for _ in needs] if cpu else assign_devices(needs, visible_devices())
    environments = [{"CUDA_VISIBLE_DEVICES": ",".join(own)} if own else {} for own in devices]
    return [Place("127.0.0.1", next(ports), next(ports), environment=own) for own in environments]
