"""`cached_tokens` in the usage of an answer whose decode engine was asked before the prefill engine had answered.

vLLM passes the prefill engine's figure on in the decode leg's `kv_transfer_params`. Where that leg comes first the
decode engine counts all that it pulled, which is nearly the whole prompt, and only the router hears the right figure.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress

PATIENCE = 1.0  # s; the prefill engine has offered its KV cache by then, and its answer follows within milliseconds

# JSON escapes quotes, so no text of the answer can hold these. The list is of gpt-oss, and has one entry: with tools
# that an engine runs itself nothing is handed over.
_COUNT = re.compile(rb'("(?:prompt|input)_tokens_details":\{[^{}]*?"cached_tokens":|"cached_tokens_per_turn":\[)\d+')


class CachedUsage:
    """Of one answer."""

    def __init__(self) -> None:
        self._num_tokens: int | None = None
        self._is_known = asyncio.Event()

    def tell(self, num_tokens: int | None) -> None:
        """What the prefill engine had cached, when its leg has ended; None if nobody knows."""
        self._num_tokens = num_tokens
        self._is_known.set()

    @staticmethod
    def is_in(body: bytes) -> bool:
        """Whether these events, or this answer, say how much was cached."""
        return b'"cached_tokens":' in body

    async def corrected(self, body: bytes) -> bytes:
        """The same by the prefill engine's figure, or as it is if that does not come."""
        if not self.is_in(body):
            return body
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                await self._is_known.wait()
        return body if self._num_tokens is None else _COUNT.sub(rb"\g<1>%d" % self._num_tokens, body)
