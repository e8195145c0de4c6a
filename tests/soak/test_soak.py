"""The short soak: two minutes of mixed traffic, hang-ups, slow clients, and engines that die and come back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.soak.conversations import Conversation
from tests.soak.footprint import Handles, memory_growth
from tests.soak.plan import PRESETS
from tests.soak.run import run_soak
from tests.soak.traffic import End, Mix
from tknp.tiny_model import make_tiny_model


def test_nothing_is_lost_stuck_or_kept(tmp_path: Path) -> None:
    summary = run_soak(PRESETS["short"], make_tiny_model(tmp_path / "model"), tmp_path, print)
    assert summary["ok"], json.dumps(summary, indent=1)
    assert summary["ends"][End.ANSWERED] > 50 and summary["ends"][End.REFUSED] > 3
    assert summary["faults"] and summary["num_answers_compared"] > 10
    assert summary["pull_backs"]["kept"] > 0 and summary["bytes_pulled_back"] > 0


def test_the_same_seed_draws_the_same_traffic_of_every_kind() -> None:
    first, second = ([mix.draw() for _ in range(400)] for mix in (Mix(PRESETS["hour"]), Mix(PRESETS["hour"])))
    assert first == second
    assert {job.ask.path for job in first} == {"/v1/completions", "/v1/chat/completions"}
    assert len({job.behaviour for job in first}) == 5
    assert any(job.ask.body.get("n", 1) > 1 for job in first) and any(not job.is_valid for job in first)
    assert any(job.conversation for job in first)


def test_a_turn_asks_with_all_that_was_said() -> None:
    conversation = Conversation(7)
    first = conversation.turn().body["prompt"]
    conversation.hear(first, (5, 6, 7))
    conversation.hear(first, (5, 6, 7))
    second = conversation.turn().body["prompt"]
    assert second[: len(first) + 3] == [*first, 5, 6, 7] and len(second) == 2 * len(first) + 3


@pytest.mark.parametrize(
    ("values", "is_flat"), [([100.0] * 40, True), ([60.0] * 10 + [100.0] * 30, True), (range(100, 140), False)]
)
def test_memory_that_keeps_growing_is_not_flat(values: Sequence[float], is_flat: bool) -> None:
    assert memory_growth(values)["is_flat"] is is_flat


def test_tasks_and_files_that_stay_are_told() -> None:
    before = Handles(num_files=20, num_tasks=15)
    assert not Handles(num_files=28, num_tasks=19).more_than(before)
    assert Handles(num_files=29, num_tasks=20).more_than(before) == [
        "router: 29 open files, 20 before",
        "router: 20 tasks, 15 before",
    ]
