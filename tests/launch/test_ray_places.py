"""What `tknp serve --ray` says where it can place nothing; tests/e2e/test_ray.py has a real cluster."""

from __future__ import annotations

import sys

import pytest

from tknp.launch.options import CannotServeError
from tknp.launch.ray_places import ray_places


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(CannotServeError, match=r"pip install -e '.\[ray\]'"):
        ray_places([1], [2])


class _Cluster:
    """As much of Ray as is asked before anything is placed."""

    def __init__(self, num_gpus: float | None) -> None:
        self._num_gpus = num_gpus

    def init(self, **_: object) -> None:
        if self._num_gpus is None:
            raise ConnectionError("Could not find any running Ray instance.")

    def available_resources(self) -> dict[str, float]:
        return {"CPU": 8.0, **({"GPU": self._num_gpus} if self._num_gpus else {})}


@pytest.mark.parametrize(
    ("num_gpus", "sentence"),
    [
        (None, "--ray needs a running Ray cluster"),
        (0.0, "need 3 GPUs and 0 of the Ray cluster are free"),
        (2.0, "need 3 GPUs and 2 of the Ray cluster are free"),
    ],
)
def test_a_cluster_that_will_not_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, num_gpus: float | None, sentence: str
) -> None:
    monkeypatch.setitem(sys.modules, "ray", _Cluster(num_gpus))
    with pytest.raises(CannotServeError, match=sentence):
        ray_places([1], [2])
