"""The guard alone: how a command ends, and that nothing of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.launched import LIMIT, STANDIN, is_alive, wait_for
from tknp.common.ports import choose_ports
from tknp.launch.child import session_members
from tknp.launch.guard import descendants


def guard(*command: str) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "tknp.launch.guard", str(os.getpid()), *command]
    return subprocess.Popen(words, start_new_session=True)


def python(source: str) -> tuple[str, str, str]:
    return sys.executable, "-c", source


@pytest.mark.parametrize(
    ("source", "code"), [("pass", 0), ("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_the_exit_code_is_the_commands(source: str, code: int) -> None:
    assert guard(*python(source)).wait(LIMIT) == code


def test_orphans_end_with_the_command(tmp_path: Path) -> None:
    source = (
        "import os, pathlib, subprocess, sys; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True); "
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))"
    )
    assert guard(*python(source)).wait(LIMIT) == 0
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_a_resource_tracker_may_finish_its_work(tmp_path: Path) -> None:
    source = (
        "import pathlib, time; from multiprocessing import shared_memory; "
        "memory = shared_memory.SharedMemory(create=True, size=1000); "
        f"path = pathlib.Path({str(tmp_path / 'name')!r}); "
        "path.with_suffix('.tmp').write_text(memory.name); path.with_suffix('.tmp').rename(path); "
        "import signal; signal.signal(2, signal.SIG_IGN); time.sleep(600)"
    )
    process = guard(*python(source))
    wait_for((tmp_path / "name").exists, "the shared memory")
    memory = Path("/dev/shm") / (tmp_path / "name").read_text()
    assert memory.exists()
    process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.0)
    process.terminate()
    assert process.wait(LIMIT) == 128 + signal.SIGKILL
    assert not memory.exists()


def test_a_second_sigterm_does_not_wait(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    process = guard(sys.executable, str(STANDIN), str(choose_ports(1)[0]), "deaf", f"grandchild={pids}")
    wait_for(pids.exists, "the grandchild")
    assert len(descendants(process.pid)) == 2
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.0)
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT) == 128 + signal.SIGKILL
    assert not any(is_alive(int(pid)) for pid in pids.read_text().split())


def test_it_does_not_start_for_a_caller_that_is_gone() -> None:
    words = [sys.executable, "-m", "tknp.launch.guard", "1", *python("print('ran')")]
    ended = subprocess.run(words, capture_output=True, check=False, timeout=LIMIT)
    assert (ended.returncode, ended.stdout) == (1, b"")


def test_it_starts_quickly_and_small() -> None:
    imported = (
        "import sys, tknp.launch.guard; print(sorted(n for n in ('aiohttp', 'asyncio', 'typer') if n in sys.modules))"
    )
    assert subprocess.check_output(python(imported), timeout=LIMIT).strip() == b"[]"


def test_session_members_are_found() -> None:
    process = subprocess.Popen(python("import time; time.sleep(600)"), start_new_session=True)
    try:
        assert session_members(process.pid) == [process.pid]
    finally:
        process.kill()
        process.wait()
    assert session_members(process.pid) == []
