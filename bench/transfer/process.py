"""A process that answers orders, one at a time, and is never waited for longer than an order may take."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

_START_SECONDS, _ORDER_SECONDS = 150.0, 60.0


class Served:
    """`serve(job, pipe)` in a new process; it first sends that it is ready, then an answer to each order."""

    def __init__(self, name: str, serve: Callable[[Any, Any], None], job: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(job, theirs))
        self._process.start()
        theirs.close()

    def wait_until_ready(self) -> None:
        """Raises RuntimeError: it ended, or took too long."""
        self._answer(_START_SECONDS)

    def ask(self, *order: Any) -> Any:
        """Raises RuntimeError: it ended, or took too long."""
        self.tell(*order)
        return self.answer()

    def tell(self, *order: Any) -> None:
        """Without waiting for its answer."""
        self._pipe.send(order)

    def answer(self) -> Any:
        """To the order before. Raises RuntimeError: it ended, or took too long."""
        return self._answer(_ORDER_SECONDS)

    def _answer(self, seconds: float) -> Any:
        if not self._pipe.poll(seconds):
            raise RuntimeError(f"the {self._name} did not answer in {seconds:.0f} s")
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"the {self._name} ended; its output says why") from None

    def tell_to_end(self) -> None:
        with suppress(OSError):  # it has ended already
            self._pipe.send(None)

    def end(self) -> None:
        """Waits for the end, but not for long."""
        self._process.join(10)
        self._process.kill()
        self._process.join(10)


@contextmanager
def ready(*served: Served) -> Iterator[None]:
    """From when all of them are ready to their end."""
    try:
        for one in served:
            one.wait_until_ready()
        yield
    finally:
        for one in served:
            one.tell_to_end()
        for one in served:
            one.end()
