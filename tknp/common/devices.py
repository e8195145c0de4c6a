"""The GPUs of this machine."""

from __future__ import annotations

import os
import subprocess


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
