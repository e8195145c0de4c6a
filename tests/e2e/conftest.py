from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.processes import start_plain
from tests.e2e.suite import Ask, Streamed, answers, streamed
from tknp.tiny_model import make_tiny_model

Expected = Callable[[Sequence[Ask]], list[list[list[int]]]]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a tiny model of the given shape once."""
    directory = tmp_path_factory.mktemp("models")
    return lambda shape: make_tiny_model(directory / shape, shape)


@pytest.fixture(scope="module")
def log_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp(request.module.__name__.rpartition(".")[2])


class PlainAnswers:
    """What plain vLLM answers. The server runs once per model, for all requests that any test will compare."""

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}
        self.streams: list[Streamed] = []

    def learn(self, model: Path, asks: Sequence[Ask], log_dir: Path, streams: Sequence[Ask] = ()) -> None:
        server = start_plain(model, log_dir)
        try:
            server.wait_ready()
            self.streams = [streamed(server, ask) for ask in streams]
            for ask, answered in zip(asks, answers(server, asks, at_once=16), strict=True):
                self._known[repr((model.name, ask))] = answered
        finally:
            server.stop()

    def expect(self, model: Path, asks: Sequence[Ask]) -> list[list[list[int]]]:
        return [self._known[repr((model.name, ask))] for ask in asks]


@pytest.fixture(scope="session")
def llama_answers(models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> PlainAnswers:
    from tests.e2e import expected

    known = PlainAnswers()
    directory = tmp_path_factory.mktemp("plain-llama")
    known.learn(models("llama"), expected.llama(), directory, expected.told_streams())
    return known


@pytest.fixture(scope="session")
def plain_llama(models: Callable[[str], Path], llama_answers: PlainAnswers) -> Expected:
    """Plain vLLM's answers for the Llama model."""
    return lambda asks: llama_answers.expect(models("llama"), asks)


@pytest.fixture(scope="session")
def plain_streams(llama_answers: PlainAnswers) -> list[Streamed]:
    """What it says in streams, of those in expected.py."""
    return llama_answers.streams


@pytest.fixture(scope="session")
def plain_gemma(models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Expected]:
    """Plain vLLM's answers for the Gemma-2 model."""
    from tests.e2e import expected

    known = PlainAnswers()
    known.learn(models("gemma2"), expected.gemma(), tmp_path_factory.mktemp("plain-gemma"))
    yield lambda asks: known.expect(models("gemma2"), asks)
