"""What the user sees."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from tknp.launch.log import last_lines

if TYPE_CHECKING:
    from tknp.launch.child import Child


class Console:
    """Prints lines with the seconds since the start in front."""

    def __init__(self) -> None:
        self._begin = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._begin

    def news(self, text: str) -> None:
        print(f"[{self.elapsed:4.0f} s] {text}", flush=True)

    def detail(self, text: str) -> None:
        print(f"         {text}", flush=True)

    def piece(self, text: str) -> None:
        """Text that goes on in the same line."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def death(self, child: Child, when: str) -> None:
        """How a process ended, in its own last words."""
        code = child.exit_code
        how = f"by signal {code - 128}" if code is not None and code > 128 else f"with exit code {code}"
        self.news(f"{child.spec.name} ended {how} {when}. Its last lines, of {child.spec.log}:")
        for line in last_lines(child.spec.log) or ["(it wrote nothing)"]:
            self.detail(line)
