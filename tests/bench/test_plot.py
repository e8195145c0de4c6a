from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.plot import draw, ratios, scaling


def row(
    setup: str, batch: int, tokens_per_second: float, ratio: float | None = None, context: int = 64
) -> dict[str, Any]:
    return {
        "shape": "8b",
        "context": context,
        "setup": setup,
        "batch": batch,
        "tokens_per_second": tokens_per_second,
        "ratio_to_best_alternative": ratio,
    }


ROWS = [
    row("t1p1", 8, 100.0),
    row("t1p1", 16, 150.0),
    row("t1p2", 16, 240.0, 0.9),
    row("t1p2", 32, 270.0, 1.2),
    row("t1p2-serial", 32, 1000.0, 3.0),
    row("t2p2", 32, 1000.0),
    row("t1p4", 64, 480.0, 1.1),
    row("t1p4", 64, 480.0, 1.3, context=128),
]


def test_efficiency_is_of_each_gpu_and_each_at_its_best_batch() -> None:
    assert scaling(ROWS) == {("8b", 64): [(1, 1.0), (2, 0.9), (4, 0.8)]}


def test_ratios_are_ours_with_everything_on() -> None:
    assert ratios(ROWS) == {
        ("8b", "t1p2"): {(16, 64): 0.9, (32, 64): 1.2},
        ("8b", "t1p4"): {(64, 64): 1.1, (64, 128): 1.3},
    }


def test_a_file_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(ROWS, tmp_path / "new" / "decode.svg")
    drawn = (tmp_path / "new" / "decode.svg").read_text()
    assert drawn.count("<svg") == 1 and "1.20" in drawn
    draw(ROWS[:3], tmp_path / "decode.png")
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")


def test_there_must_be_something_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        draw(ROWS[:1], tmp_path / "decode.svg")
