"""The exchange between three ranks in one process: the real kernels, in Triton's interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "interpreted_exchange.py"


def test_rows_reach_their_owners_and_the_outputs_come_back_in_batch_order() -> None:
    # Triton decides when it is imported whether it compiles or interprets, so this needs a process of its own.
    ended = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "3 + 3 steps of 2 layers"
