"""The file of --discovery file: one engine a line, its role and its URL.

prefill http://10.0.0.5:8100
decode  http://10.0.0.6:8200   # comments and empty lines are left out
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from router.types import Endpoint, Role

if TYPE_CHECKING:
    from pathlib import Path


def check_engine_url(url: str) -> str:
    """The URL without a slash at its end. Raises ValueError."""
    parts = urlsplit(url := url.rstrip("/"))
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path or parts.query or "@" in url:
        raise ValueError(f"an engine is http://host:port without a path, not {url!r}")
    return url


def read_engines(path: Path) -> list[Endpoint]:
    """Raises ValueError with the line that is wrong."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the engine file {path} can't be read: {error}") from error
    engines: list[Endpoint] = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            role, url = words
            engine = Endpoint(Role(role), check_engine_url(url))
        except ValueError as error:
            raise ValueError(f"the engine file {path}, line {number}: not `prefill URL` or `decode URL`") from error
        if engine in engines:
            raise ValueError(f"the engine file {path}, line {number}: {url} is listed twice")
        engines.append(engine)
    return engines
