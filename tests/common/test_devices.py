"""Which GPUs a process may use."""

from __future__ import annotations

from pathlib import Path

import pytest

from tknp.common.devices import visible_devices
from tknp.launch.devices import assign_devices


def test_a_machine_without_gpus_offers_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_devices() == []
    assert assign_devices([], []) == []


def test_what_the_environment_names_is_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5,")
    assert visible_devices() == ["2", "5"]
