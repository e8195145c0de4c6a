"""Starts programs for the tests and waits for what they do; every wait polls a condition and has a generous limit."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tknp.common.ports import choose_ports

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LIMIT = 60.0  # seconds
SUPERVISE = Path(__file__).with_name("supervise.py")
STANDIN = Path(__file__).with_name("standin.py")


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, f"waited {LIMIT:g} s for {what}"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Whether it runs; a process that ended but was not collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Supervised:
    """A running supervisor with a router and engines that are stand-ins."""

    def __init__(self, folder: Path, children: Sequence[tuple[str, str, str]], **environment: str) -> None:
        self.folder = folder
        self.names = [name for name, _, _ in children]
        ports = choose_ports(len(children))
        words = [f"{name}:{role}:{port}:{b}" for (name, role, b), port in zip(children, ports, strict=True)]
        self.output_path = folder / "output"
        with self.output_path.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(SUPERVISE), str(folder), *words],
                stdout=output,
                stderr=output,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.output_path.read_text()

    def pids(self, name: str) -> list[int]:
        """Of the child and of its grandchild, for a child with the behaviour `grandchild`."""
        path = self.folder / f"{name}.pids"
        wait_for(path.exists, f"the grandchild of {name}")
        return [int(pid) for pid in path.read_text().split()]

    def wait_until_serving(self) -> None:
        wait_for(lambda: "until Ctrl-C" in self.output or self.process.poll() is not None, "serving")
        assert self.process.poll() is None, self.output

    def wait(self) -> int:
        return self.process.wait(LIMIT)
