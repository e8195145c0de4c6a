"""Reading what an engine writes: the stage that it is in, and the lines that say why it ended."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

# What vLLM 0.32 logs at the begin of each stage of its start, in order.
STAGES = (
    ("non-default args", "reading the model's configuration"),
    ("Initializing a V1 LLM engine", "starting its workers"),
    ("Starting to load model", "loading weights"),
    ("Loading weights took", "allocating the KV cache"),
    ("KV cache size", "warming up"),
    ("Starting vLLM server", "opening its port"),
)
FIRST_STAGE = "starting Python"

# "(EngineCore pid=7) ERROR 11-20 12:43:56 [core.py:13] text", in front of most of vLLM's lines.
_PREFIX = re.compile(r"^(\(\S+ pid=\d+\) )?((?P<level>[A-Z]+) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?)?")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# Python's frames, and what interpreters and libraries say on their way out.
_NOISE = re.compile(
    r"Traceback \(most recent|File \"|During handling of|The above exception was|[\s~^]*$"
    r"|\[shutdown\]|nanobind|- leaked |- \.\.\. skipped|See https://nanobind|resource_tracker|warnings\.warn"
    r"|.*Warning: |Triton is |Route: |Engine \d+: |KV Transfer metrics: |INFO: |.* NIXL INFO |Loading safetensors"
)
# What goes on in the indented lines that follow: a traceback, a usage message, the source line of a Python warning.
_GOES_ON = re.compile(r"Traceback \(most recent|usage: |.*Warning: ")
_TAIL_BYTES = 128 * 1024
_MAX_LENGTH = 400  # characters of one line


def clean(line: str) -> str:
    """The line without colours and vLLM's prefix, and of a progress bar only its last state; still indented."""
    return _PREFIX.sub("", _COLOUR.sub("", line).rstrip().rpartition("\r")[2])


def last_lines(log: Path, num_lines: int = 15) -> list[str]:
    """The last lines that say why a process ended: no traceback frames, no noise, nothing twice.

    What vLLM logs below ERROR counts only if there is nothing else.
    """
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").split("\n")
    errors: dict[str, None] = {}
    others: dict[str, None] = {}
    inside = False
    for raw in lines:
        line = clean(raw)
        text = line.strip()
        if _GOES_ON.match(text):
            inside = True
        elif inside and line and not line[0].isspace():
            inside = False  # after a traceback this is the exception itself, which is what we are after
        if inside or _NOISE.match(text):
            continue
        level = _PREFIX.match(_COLOUR.sub("", raw))
        kept = others if level and level["level"] in ("DEBUG", "INFO", "WARNING") else errors
        kept.pop(text[:_MAX_LENGTH], None)  # of two equal lines the later one counts
        kept[text[:_MAX_LENGTH]] = None
    return list(errors or others)[-num_lines:]


class StageReader:
    """Follows a log that is being written."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._position = 0
        self._rest = ""
        self.stage = FIRST_STAGE
        self.last_line = ""

    def read(self) -> str:
        """Takes in what was written since the last call and returns the stage."""
        with self._log.open("rb") as file:
            file.seek(self._position)
            data = file.read()
        self._position += len(data)
        *lines, self._rest = (self._rest + data.decode(errors="replace")).split("\n")
        for line in lines:
            self._take(line)
        return self.stage

    def _take(self, line: str) -> None:
        text = clean(line).strip()
        if not _NOISE.match(text):
            self.last_line = text
        names = [name for _, name in STAGES]
        reached = names.index(self.stage) if self.stage in names else -1
        # Only forward: several workers write to one log.
        for index, (mark, name) in enumerate(STAGES):
            if index > reached and mark in text:
                self.stage = name
