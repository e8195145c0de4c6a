"""What `tknp serve` was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class CannotServeError(Exception):
    """`tknp serve` can't do what it was asked for; the message is one sentence for the user."""


@dataclass(frozen=True)
class ServeOptions:
    """The options of `tknp serve`; the command line holds their meaning and defaults."""

    model: str
    host: str
    port: int
    prefill_replicas: int
    decode_replicas: int
    token_parallel_size: int
    vllm_args: tuple[str, ...]  # for every engine
    prefill_args: tuple[str, ...]
    decode_args: tuple[str, ...]
    prompt: str
    startup_timeout: float  # seconds
    log_dir: Path | None
    ray: bool = False

    @property
    def logs(self) -> Path:
        # Named after the port, which only one `tknp serve` of a machine has at a time.
        return self.log_dir or Path("logs") / f"serve-{self.port}"
