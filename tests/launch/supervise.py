"""Runs `tknp serve`'s supervision over stand-ins: supervise.py <folder for logs> <name:role:port:behaviour,...>..."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from tknp.launch.options import ServeOptions
from tknp.launch.plan import ChildSpec, Role
from tknp.launch.serve import supervise

STANDIN = Path(__file__).with_name("standin.py")


def main() -> int:
    logs = Path(sys.argv[1])
    specs = []
    for word in sys.argv[2:]:
        name, role, port, behaviours = word.split(":", 3)
        command = (sys.executable, str(STANDIN), port, *behaviours.split(","))
        url = f"http://127.0.0.1:{port}"
        specs.append(ChildSpec(name, Role(role), command, url, "/health", logs / f"{name}.log", os.environ))
    options = ServeOptions(
        model="toy",
        host="127.0.0.1",
        port=1,
        prefill_replicas=1,
        decode_replicas=1,
        token_parallel_size=1,
        vllm_args=(),
        prefill_args=(),
        decode_args=(),
        prompt="What is the capital of France?",
        startup_timeout=float(os.environ.get("STARTUP_TIMEOUT", "120")),
        log_dir=logs,
    )
    return asyncio.run(supervise(specs, options))


if __name__ == "__main__":
    sys.exit(main())
