"""Reads a request's body up to a limit, whatever its Content-Length says."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from router.errors import BodyTimeout, BodyTooLarge, CompressedBody

if TYPE_CHECKING:
    from starlette.types import Receive


class ClientGone(Exception):
    """The client hung up before its request was complete."""


async def read_body(
    headers: list[tuple[bytes, bytes]], receive: Receive, max_bytes: int, max_seconds: float, is_here: bool = False
) -> bytes:
    """Raises BodyTooLarge as soon as the limit is known to be passed, CompressedBody, BodyTimeout, or ClientGone.

    A body of which all `is_here` needs no timer, and most are.
    """
    for name, value in headers:
        if name == b"content-length" and int(value) > max_bytes:
            raise _too_large(max_bytes, f"{int(value)} bytes")
        if name == b"content-encoding" and value.lower() not in (b"identity", b""):
            raise CompressedBody(f"The body is encoded with {value.decode('latin-1')!r}. Send it as plain JSON.")
    if is_here:
        return await _read(receive, max_bytes)
    try:
        async with asyncio.timeout(max_seconds):
            return await _read(receive, max_bytes)
    except TimeoutError as error:
        raise BodyTimeout(f"The body did not arrive within {max_seconds:g} s.") from error


async def _read(receive: Receive, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    num_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part: bytes = message.get("body", b"")
        num_bytes += len(part)
        if num_bytes > max_bytes:
            raise _too_large(max_bytes, f"at least {num_bytes} bytes")
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _too_large(max_bytes: int, size: str) -> BodyTooLarge:
    return BodyTooLarge(f"The body has {size}; at most {max_bytes} are accepted. Send a shorter prompt.")
