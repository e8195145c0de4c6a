"""A stand-in for SLURM that runs our batch scripts on hosts of tests/e2e/hosts.py: the script itself on the first node
of its job, and by `srun` one task on each node."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tests.e2e.hosts import OVER_TCP, Host
from tests.e2e.processes import Service
from tknp.common.ports import free_port

SCRIPTS = Path(__file__).parents[2] / "deploy" / "slurm"

_SRUN = """#!/usr/bin/env bash
# One task on each node; if one fails, the others are ended too where --kill-on-bad-exit says so.
kill_on_bad_exit=
while [[ $1 == -* ]]; do if [ "$1" = --kill-on-bad-exit=1 ]; then kill_on_bad_exit=1; fi; shift; done
node=0
for name in $STANDIN_NODES; do
    SLURM_NODEID=$node ip netns exec "$name" "$@" &
    node=$((node + 1))
done
status=0
for _ in $STANDIN_NODES; do
    wait -n || { status=$?; if [ -n "$kill_on_bad_exit" ]; then sleep 5; kill $(jobs -p) 2> /dev/null; fi; }
done
exit $status
"""


def start_job(name: str, script: str, nodes: Sequence[Host], log_dir: Path, *words: str) -> Service:
    """Runs `script` as a job on `nodes`; without any, on the machine itself. Its service is that of the first node."""
    tools = log_dir / "bin"
    tools.mkdir(exist_ok=True)
    for tool, text in (("srun", _SRUN), ("tknp", f'#!/bin/sh\nexec "{sys.executable}" -m tknp "$@"\n')):
        (tools / tool).write_text(text)
        (tools / tool).chmod(0o755)
    port = free_port()
    job = {
        "SLURM_JOB_ID": str(port),
        "SLURM_NNODES": str(len(nodes)),
        "SLURM_CPUS_PER_TASK": "16",
        "STANDIN_NODES": " ".join(node.name for node in nodes),
        "TKNP_RUN_DIR": str(log_dir / "run"),
        "TKNP_INTERFACE": "eth0",
        "TKNP_PORT": str(port),
        "PATH": f"{tools}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "VLLM_HOST_IP": "",
    }
    command = ["bash", str(SCRIPTS / script), *words]
    address = nodes[0].address if nodes else "127.0.0.1"
    return Service(name, nodes[0].command(command) if nodes else command, log_dir, port, {**OVER_TCP, **job}, address)
