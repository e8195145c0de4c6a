"""The SLURM scripts on one node with a stand-in for `srun`, and the command lines that come out of them read by
the real `tknp`. tests/e2e/test_hosts.py runs them with engines on several hosts."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.decode.token_parallel.options import Nodes
from tknp import cli

SCRIPTS = Path(__file__).parents[2] / "deploy" / "slurm"
TOOLS = {
    "srun": 'while [[ $1 == -* ]]; do shift; done; SLURM_NODEID=1 exec "$@"',
    "tknp": 'printf "%q " "$@" > "$RECORD"; cat "$TKNP_RUN_DIR"/*/* > "$RECORD.urls"; cat "$TKNP_RUN_DIR"/engines-77 '
    '> "$RECORD.engines" 2> /dev/null || true',
    "hostname": "echo localhost",
}

Job = Callable[..., list[str]]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Runs a script to its end and returns the words that its `tknp` got."""
    for name, body in TOOLS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def run(script: str, *words: str, **environment: str) -> list[str]:
        given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(tmp_path / "record"), "SLURM_NNODES": "2"}
        given["SLURM_CPUS_PER_TASK"] = "8"
        given |= {"SLURM_JOB_ID": "77", "TKNP_RUN_DIR": str(tmp_path / "run"), **environment}
        subprocess.run(["bash", str(SCRIPTS / script), *words], env=given, check=True, timeout=60)
        return shlex.split((tmp_path / "record").read_text())

    return run


def taken(monkeypatch: pytest.MonkeyPatch, target: str, words: list[str]) -> tuple[Any, ...]:
    """What the real command line makes of `words`."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(target, lambda *args: calls.append(args))
    monkeypatch.setattr(sys, "argv", ["tknp", *words])
    with pytest.raises(SystemExit):
        cli.main()
    return calls[0]


def test_a_prefill_job_is_an_engine_on_each_node(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = job("prefill.sbatch", "a/model", "--hf-overrides", '{"a": "b c"}')
    args = taken(monkeypatch, "services.prefill.service.run_prefill", words)
    assert args == ("a/model", "127.0.0.1", 8100, 8101, ["--hf-overrides", '{"a": "b c"}'], False)
    assert (tmp_path / "record.urls").read_text() == "http://127.0.0.1:8100\n"
    assert not list((tmp_path / "run" / "prefill").iterdir()), "the address of an engine that has ended"


def test_a_decode_job_is_one_engine_over_all_nodes(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = job("decode.sbatch", "a/model", "--token-parallel-size", "4", "--enforce-eager", TKNP_PORT="9000")
    args = taken(monkeypatch, "services.decode.service.run_decode", words)
    nodes = Nodes(2, 1, "127.0.0.1", 29501)
    assert args == ("a/model", "127.0.0.1", 9000, 4, None, ["--enforce-eager"], None, False, nodes, "root")
    assert (tmp_path / "record.urls").read_text() == "http://127.0.0.1:9000\n"
    assert not list((tmp_path / "run" / "decode").iterdir())


def test_a_router_job_waits_for_the_engines_that_it_was_told_of(job: Job, tmp_path: Path) -> None:
    for name, url in (("prefill/7-0", "http://a:1"), ("prefill/7-1", "http://b:2"), ("decode/8", "http://c:3")):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text(f"{url}\n")
    words = job("router.sbatch", "--decode-policy", "round_robin", TKNP_PREFILL_ENGINES="2")
    file = tmp_path / "run" / "engines-77"
    assert words == shlex.split(
        f"router --host 0.0.0.0 --port 8000 --discovery file --engines-file {file} --decode-policy round_robin"
    )
    assert (tmp_path / "record.engines").read_text() == "prefill http://a:1\nprefill http://b:2\ndecode http://c:3\n"
    with pytest.raises(subprocess.CalledProcessError):
        job("router.sbatch", TKNP_DECODE_ENGINES="2", TKNP_WAIT_SECONDS="0")


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sbatch")), ids=lambda script: script.name)
def test_slurm_reads_its_own_lines(script: Path) -> None:
    # sbatch stops reading at the first line that is neither a comment nor empty.
    lines = script.read_text().splitlines()
    head = next(index for index, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [index for index, line in enumerate(lines) if line.startswith("#SBATCH ")]
    assert directives
    assert max(directives) < head
