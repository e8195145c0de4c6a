"""Runs one command and, whatever happens, ends together with everything that the command started.

    python -m tknp.launch.guard <pid of the caller> <command>...

vLLM's engine core and workers are grandchildren: a SIGKILL of their server, or of `tknp serve`, would leave them.
This process is a subreaper, so orphans become its children however they were started; and the kernel tells it when its
caller dies. SIGTERM asks it to stop; a second one, to do so at once.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
# Signals to the command's process group, and the seconds that it then has; SIGKILL follows. vLLM needs 1 to 6 s.
_ESCALATION = ((signal.SIGINT, 15.0), (signal.SIGTERM, 5.0))
_GRACE_OF_THE_REST = 3.0  # seconds for grandchildren once the command itself has ended
# Python's resource tracker removes shared memory (up to 250 MB each) when all its users have ended, so it goes last.
_TRACKER = b"multiprocessing.resource_tracker"
_GRACE_OF_TRACKERS = 5.0
_HANDLED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}


def main() -> None:
    caller, command = int(sys.argv[1]), sys.argv[2:]
    signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != caller:  # it died before the kernel knew that we want to hear of it
        sys.exit(1)
    process = subprocess.Popen(command, process_group=0, preexec_fn=_prepare_command)
    status = _end_the_rest(process.pid, _watch(process.pid))
    sys.exit(status if status >= 0 else 128 - status)


def _prepare_command() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _watch(pid: int) -> int | None:
    """Waits for the process, stopping it when asked to.

    Returns its exit code, negative for a signal; None if it has to be killed.
    """
    steps = iter(_ESCALATION)
    deadline = math.inf
    while True:
        asked = _wait_for_a_signal(min(3600.0, deadline - time.monotonic()))
        status = _reap(pid)
        if status is not None:
            return status
        if asked and deadline < math.inf:
            return None
        if asked or time.monotonic() >= deadline:
            step = next(steps, None)
            if step is None:
                return None
            deadline = time.monotonic() + step[1]
            with suppress(ProcessLookupError):
                os.killpg(pid, step[0])


def _wait_for_a_signal(timeout: float) -> bool:
    """Returns after a signal or `timeout` seconds; whether it was one that asks us to stop."""
    received = signal.sigtimedwait(_HANDLED, max(0.0, timeout))
    return received is not None and received.si_signo in (signal.SIGTERM, signal.SIGHUP)


def _reap(pid: int) -> int | None:
    """Collects every child that has ended; the exit code of `pid` if it is among them."""
    code = None
    try:
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == pid:
                code = os.waitstatus_to_exitcode(ended[1])
    except ChildProcessError:  # no child left
        pass
    return code


def _end_the_rest(pid: int, status: int | None) -> int:
    """Returns when this process has no descendant left, with the exit code of `pid`; `status` if it is known."""
    kill_at = time.monotonic() + (0.0 if status is None else _GRACE_OF_THE_REST)
    while True:
        ended = _reap(pid)
        status = ended if status is None else status
        rest = descendants(os.getpid())
        if not rest:
            return 1 if status is None else status
        now = time.monotonic()
        for descendant in rest if now >= kill_at else ():
            if now >= kill_at + _GRACE_OF_TRACKERS or not _is_tracker(descendant):
                with suppress(ProcessLookupError):
                    os.kill(descendant, signal.SIGKILL)
        if _wait_for_a_signal(0.05):
            kill_at = min(kill_at, time.monotonic())


def _is_tracker(pid: int) -> bool:
    try:
        return _TRACKER in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def descendants(root: int) -> set[int]:
    """The processes below `root`, from /proc; those that have ended but were not collected yet count too."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                # The name, in brackets, may hold anything; what follows it is the state and the parent.
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
    found: set[int] = set()
    level = {root}
    while level:
        level = {pid for pid, parent in parents.items() if parent in level}
        found |= level
    return found


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


if __name__ == "__main__":
    main()
