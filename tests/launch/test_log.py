"""Stages and last lines, read from what vLLM 0.32 writes on CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tknp.launch.log import FIRST_STAGE, StageReader, clean, last_lines

if TYPE_CHECKING:
    from pathlib import Path

CONFIGURATION = "reading the model's configuration"
DYING = """\
Triton is installed, but doesn't include CPU backend. Disabling Triton.
(APIServer pid=1) INFO 11-20 12:43:56 [api_utils.py:286] non-default args: {'port': 28700}
(EngineCore pid=2) INFO 11-20 12:44:15 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: model='m'
(EngineCore pid=2) ERROR 11-20 12:44:20 [core.py:1100] EngineCore failed to start.
(EngineCore pid=2) ERROR 11-20 12:44:20 [core.py:1100] Traceback (most recent call last):
(EngineCore pid=2) ERROR 11-20 12:44:20 [core.py:1100]   File "/x/core.py", line 1090, in run_engine_core
(EngineCore pid=2) ERROR 11-20 12:44:20 [core.py:1100]     engine_core = EngineCoreProc(*args, **kwargs)
(EngineCore pid=2) ERROR 11-20 12:44:20 [core.py:1100]                   ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
(EngineCore pid=2) ERROR 11-20 12:44:20 [core.py:1100] ValueError: the KV cache is too small for one request
(EngineCore pid=2) Process EngineCore:
(EngineCore pid=2) Traceback (most recent call last):
(EngineCore pid=2)   File "/x/process.py", line 314, in _bootstrap
(EngineCore pid=2)     self.run()
(EngineCore pid=2) ValueError: the KV cache is too small for one request

(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.
nanobind: leaked 4 instances!
 - leaked instance 0x7f995e93d108 of type "triton._C.libtriton.ir.attribute"
/usr/lib/python3.11/multiprocessing/resource_tracker.py:254: UserWarning: resource_tracker: There appear to be 1 leaked
  warnings.warn('resource_tracker: There appear to be %d '
"""


def test_last_lines_are_the_engines_own_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(DYING)
    assert last_lines(log, 4) == [
        "EngineCore failed to start.",
        "Process EngineCore:",
        "ValueError: the KV cache is too small for one request",
        "RuntimeError: Engine core initialization failed. See root cause above.",
    ]


def test_last_lines_of_a_wrong_option(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("usage: tknp decode [-h]\n    [--seed SEED]\n\ntknp decode: error: unrecognized arguments: --nope\n")
    assert last_lines(log) == ["tknp decode: error: unrecognized arguments: --nope"]


def test_last_lines_of_a_process_without_errors(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("(APIServer pid=1) INFO 11-20 12:43:56 [api_utils.py:286] all is well\n")
    assert last_lines(log) == ["all is well"]


def test_last_lines_of_a_long_log_with_bytes_that_are_no_text(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"\xff\xfe\n" * 200_000 + b"the end\n")
    assert last_lines(log)[-1] == "the end"


def test_last_lines_of_an_empty_log(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    assert last_lines(tmp_path / "log") == []


def test_a_progress_bar_shows_its_last_state() -> None:
    assert clean("\x1b[36mLoading shards:   0%\rLoading shards: 100%\x1b[0m\n") == "Loading shards: 100%"


def test_stages_go_forward_as_the_log_grows(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    reader = StageReader(log)
    assert reader.read() == FIRST_STAGE
    with log.open("a") as file:
        for text, stage in [
            ("(APIServer pid=1) INFO 11-20 12:43:56 [a.py:1] non-default args: {}\n", CONFIGURATION),
            ("(Worker pid=3) INFO 11-20 12:44:25 [cpu_model_runner.py:68] Starting to lo", CONFIGURATION),
            ("ad model /m...\n", "loading weights"),
            ("(EngineCore pid=2) INFO 11-20 12:44:26 [b.py:1] CPU KV cache size: 262,144 tokens\n", "warming up"),
            ("(Worker pid=4) INFO 11-20 12:44:26 [b.py:1] Loading weights took 1 second\n", "warming up"),
            ("(APIServer pid=1) INFO 11-20 12:44:30 [e.py:1] Starting vLLM server on http://x\n", "opening its port"),
        ]:  # fmt: skip
            file.write(text)
            file.flush()
            assert reader.read() == stage
    assert reader.last_line == "Starting vLLM server on http://x"
