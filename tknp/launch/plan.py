"""From options to processes: which run, with which command line, environment, address and log."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from tknp.common.ports import PortError, is_free
from tknp.launch.defaults import environment, is_cpu_build, vllm_options
from tknp.launch.options import CannotServeError, ServeOptions
from tknp.launch.places import local_places
from tknp.launch.ray_places import ray_places

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_TKNP = (sys.executable, "-m", "tknp")


class Role(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    ROUTER = "router"


@dataclass(frozen=True)
class ChildSpec:
    """One process to run."""

    name: str
    role: Role
    command: tuple[str, ...]
    url: str
    ready_path: str  # answers 200 once the process does its work
    log: Path
    environment: Mapping[str, str] = field(repr=False)


def plan_children(options: ServeOptions, scratch: str) -> list[ChildSpec]:
    """The router first, then the engines; `scratch` is a folder for their temporary files.

    Raises:
        CannotServeError: the port is taken, or the engines need more GPUs than there are, here or on the Ray cluster.
    """
    try:
        if not is_free(options.host, options.port):
            raise CannotServeError(f"port {options.port} is in use; choose another with --port")
    except PortError as error:
        raise CannotServeError(f"--host {error}") from error
    cpu = is_cpu_build()
    engines = _plan_engines(options, cpu, scratch)
    urls = {role: ",".join(child.url for child in engines if child.role is role) for role in Role}
    command = (
        *(*_TKNP, "router", "--host", options.host, "--port", str(options.port)),
        *("--prefill-urls", urls[Role.PREFILL], "--decode-urls", urls[Role.DECODE]),
    )
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.host, options.host)
    reachable = f"[{address}]" if ":" in address else address
    return [
        ChildSpec(
            name="router",
            role=Role.ROUTER,
            command=command,
            url=f"http://{reachable}:{options.port}",
            ready_path="/ready",
            log=options.logs / "router.log",
            environment=environment(options.model, cpu, os.environ),
        ),
        *engines,
    ]


def _plan_engines(options: ServeOptions, cpu: bool, scratch: str) -> list[ChildSpec]:
    own_args = {Role.PREFILL: options.prefill_args, Role.DECODE: options.decode_args}
    roles = [Role.PREFILL] * options.prefill_replicas + [Role.DECODE] * options.decode_replicas
    tensor_parallel = {role: _tensor_parallel_size((*options.vllm_args, *own_args[role])) for role in own_args}
    num_ranks = {Role.PREFILL: 1, Role.DECODE: options.token_parallel_size}
    needs = [tensor_parallel[role] * num_ranks[role] for role in roles]
    if options.ray:
        has_ranks = options.token_parallel_size > 1
        on_one_node = options.prefill_replicas if has_ranks else len(needs)
        places = ray_places(needs[:on_one_node], needs[on_one_node:])
        if has_ranks:
            own_args[Role.DECODE] = (*own_args[Role.DECODE], "--distributed-executor-backend", "ray")
    else:
        places = local_places(needs, cpu)
    children = []
    for index, (role, place) in enumerate(zip(roles, places, strict=True)):
        given = (*options.vllm_args, *own_args[role])
        command = (
            *(*place.launcher, "-m", "tknp", role, options.model, "--host", place.address),
            *("--port", str(place.port), "--side-channel-port", str(place.side_channel_port)),
            *(("--token-parallel-size", str(options.token_parallel_size)) if role is Role.DECODE else ()),
            *vllm_options(options.model, cpu, given),
            *given,
        )
        # Ray takes the environment to other machines, where this folder is not.
        temporary = {} if options.ray else {"TMPDIR": scratch}
        variables = environment(options.model, cpu, os.environ) | temporary | dict(place.environment)
        name = f"{role}-{roles[:index].count(role)}"
        url = f"http://{place.address}:{place.port}"
        children.append(ChildSpec(name, role, command, url, "/health", options.logs / f"{name}.log", variables))
    return children


def _tensor_parallel_size(given: Sequence[str]) -> int:
    """What vLLM will read: the last of its spellings that is given, 1 without one."""
    size = "1"
    for index, word in enumerate(given):
        name, _, value = word.partition("=")
        if name.replace("_", "-") in ("--tensor-parallel-size", "-tp"):
            size = value or next(iter(given[index + 1 :]), "")
    if not size.isdecimal() or int(size) < 1:
        raise CannotServeError(f"--tensor-parallel-size is a positive number, not {size!r}")
    return int(size)
