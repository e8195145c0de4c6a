"""What `tknp serve` sets for its engines, each only where the user said nothing.

`tknp prefill` and `tknp decode` by themselves set nothing of this.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Weights of this many bytes are a toy: exact float32 and a short context cost nothing there.
_SMALL_MODEL_BYTES = 64 * 2**20

_EVERYWHERE = {
    "VLLM_HOST_IP": "127.0.0.1",  # all engines are on this machine; vLLM would look for its outside address
    "VLLM_NO_USAGE_STATS": "1",  # nothing is reported to anybody
    "DO_NOT_TRACK": "1",
    "PYTHONUNBUFFERED": "1",  # the stages shown while an engine starts are read from its log
    "NO_COLOR": "1",
}
_ON_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB for each rank; vLLM would take half of the machine for each engine
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # engines share the cores; bound, they would all take the same ones
    "OMP_NUM_THREADS": "1",
}
_OPTIONS_ON_CPU = {
    "--enforce-eager": None,  # compiling takes longer than a short run gains
    "--block-size": "32",  # CPU attention wants a multiple of 32
    "--max-num-seqs": "32",
}
_OPTIONS_OF_A_SMALL_MODEL = {"--max-model-len": "2048", "--dtype": "float32"}


def is_cpu_build() -> bool:
    """Whether the vLLM that is installed is the one for CPUs; they have the same import name."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def environment(model: str, cpu: bool, base: Mapping[str, str]) -> dict[str, str]:
    """`base` and what it lacks."""
    ours = {**_EVERYWHERE, **(_ON_CPU if cpu else {})}
    if Path(model).is_dir():
        ours["HF_HUB_OFFLINE"] = "1"
    return {**ours, **base}


def vllm_options(model: str, cpu: bool, given: Sequence[str]) -> list[str]:
    """The options to put before those that the user gave."""
    ours = {**(_OPTIONS_ON_CPU if cpu else {}), **(_OPTIONS_OF_A_SMALL_MODEL if cpu and is_small(model) else {})}
    words = []
    for name, value in ours.items():
        if not is_given(name, given):
            words += [name] if value is None else [name, value]
    return words


def is_given(name: str, words: Sequence[str]) -> bool:
    """Whether `words` set the option, in any of the ways of writing it that vLLM knows."""
    spellings = {name, name.replace("--", "--no-", 1)}
    return any(word.partition("=")[0].replace("_", "-") in spellings for word in words)


def is_small(model: str) -> bool:
    weights = list(Path(model).glob("*.safetensors"))
    return bool(weights) and sum(file.stat().st_size for file in weights) <= _SMALL_MODEL_BYTES
