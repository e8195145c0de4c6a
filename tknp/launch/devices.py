"""Which GPUs each engine of this machine gets: its own, since vLLM fills what it sees."""

from __future__ import annotations

import os
import subprocess

from tknp.launch.options import CannotServeError


def visible_devices() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name on this machine; empty without a GPU."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [device.strip() for device in chosen.split(",") if device.strip()]
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(index) for index in range(sum(line.startswith("GPU ") for line in listing.splitlines()))]


def assign_devices(needs: list[int], devices: list[str]) -> list[list[str]]:
    """Disjoint devices for engines that need so many each.

    Raises:
        CannotServeError: there are not enough of them.
    """
    if sum(needs) > len(devices):
        raise CannotServeError(
            f"these engines need {sum(needs)} GPUs ({' + '.join(map(str, needs))}) and this machine offers "
            f"{len(devices)}; ask for fewer replicas or a smaller --token-parallel-size or --tensor-parallel-size"
        )
    rest = iter(devices)
    return [[next(rest) for _ in range(need)] for need in needs]
