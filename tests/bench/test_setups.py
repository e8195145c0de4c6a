from __future__ import annotations

import pytest

from bench.setups import Setup
from bench.shapes import SHAPES


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tp4", Setup("tp4", 1, 4, 1)),
        ("dp4", Setup("dp4", 4, 1, 1)),
        ("dp2tp2", Setup("dp2tp2", 2, 2, 1)),
        ("tp4dcp2", Setup("tp4dcp2", 1, 4, 1, 2)),
        ("t1p4", Setup("t1p4", 1, 1, 4)),
        ("t1p4-serial", Setup("t1p4-serial", 1, 1, 4, variant="serial")),
        ("t2p2-spread", Setup("t2p2-spread", 1, 2, 2, variant="spread")),
        ("t1p4-piecewise", Setup("t1p4-piecewise", 1, 1, 4, variant="piecewise")),
        ("t2p2", Setup("t2p2", 1, 2, 2)),
        ("t1p3", Setup("t1p3", 1, 1, 3)),
        ("dp2", Setup("dp2", 2, 1, 1)),
    ],
)
def test_a_name_says_how_the_gpus_are_used(name: str, expected: Setup) -> None:
    assert Setup.parse(name) == expected
    assert expected.num_gpus == {"t1p3": 3, "dp2": 2}.get(name, 4)


@pytest.mark.parametrize("name", ["", "tp", "4", "tp4dp2", "t4", "p4t1", "tp-1", "dcp2", "tp4-serial", "t1p4-"])
def test_another_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="a setup is"):
        Setup.parse(name)


def test_sizes_are_those_of_the_models() -> None:
    assert SHAPES["8b"].kv_bytes_per_token == 131_072
    assert SHAPES["8b-2kv"].kv_bytes_per_token == 32_768
    assert 14.5e9 < SHAPES["8b"].weight_bytes < 15.5e9
    assert 60e9 < SHAPES["32b-2kv"].weight_bytes < 66e9


def test_the_floor_counts_copies_of_weights_and_of_kv_heads() -> None:
    shape = SHAPES["8b-2kv"]
    kv, weights = 64 * 1000 * shape.kv_bytes_per_token, shape.weight_bytes
    floors = {
        "t1p4": (kv + weights) / 4,
        "dp4": (kv + 4 * weights) / 4,
        "tp4": (2 * kv + weights) / 4,
        "dp2tp2": (kv + 2 * weights) / 4,
    }
    for name, num_bytes in floors.items():
        assert Setup.parse(name).floor_seconds(shape, 64, 1000, 1e12) == pytest.approx(num_bytes / 1e12)
