"""The last events of a stream with stop strings, and by them the text of its tokens.

Engines hold back what may become a stop string, so the client lacks text of tokens that it has. /detokenize tells text
of any tokens, but has the special ones too, which streams leave out.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import orjson

from router.stream_fields import CantContinue
from router.types import JsonObject, NoContinuation

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    Decode = Callable[[list[int]], Awaitable[str]]

_NUM_EVENTS = 48
_TOKENS_PER_CHARACTER = 4  # at most (byte-level BPE)
_MARGIN = 16  # characters beside those that were held back, that must be what was sent
_EVIDENCE = 8  # characters that are hardly ever the same by chance
_MAX_EARLY = 16  # tries; an engine answers each in a millisecond


class Recent:
    """Events as they came from an engine, and as the client was sent them."""

    def __init__(self) -> None:
        self._events: deque[tuple[bytes, bytes]] = deque(maxlen=_NUM_EVENTS)

    def append(self, came: bytes, sent: bytes) -> None:
        self._events.append((came, sent))

    async def text(self, prompt_ids: Sequence[int], ids: Sequence[int], decode: Decode, num_held: int) -> str:
        """The last text of an answer's tokens, at least what was held back of it: `num_held` characters.

        Raises CantContinue if no text that the tokens may have fits to what was sent.
        """
        sent = "".join(text_of(event) for _, events in self._events for event in _parsed(events))
        early, silent = self._without_text()
        # A part of a character has no text of its own either; a special token has, wherever it is asked for.
        special = {token for token in silent if "\ufffd" not in await decode([token])}
        for also in (set[int](), *({token} for token in early[:_MAX_EARLY])):
            shown = [token for token in ids if token not in special | also]
            if (text := await self._fitting(prompt_ids, shown, decode, num_held, sent)) is not None:
                return text
        raise CantContinue(NoContinuation.TEXT)

    async def _fitting(
        self, prompt_ids: Sequence[int], ids: Sequence[int], decode: Decode, num_held: int, sent: str
    ) -> str | None:
        if len(sent) >= _EVIDENCE:
            window = _TOKENS_PER_CHARACTER * (2 * num_held + 2 * _MARGIN)
            # Where nothing is held back the answer may be short, and no stop string may begin in the prompt.
            text = await decode([*(prompt_ids[-window:] if num_held else ()), *ids[-window:]][-window:])
            fits = text[: len(text) - num_held].endswith(sent[-num_held - _MARGIN :])
        else:
            text = await decode(list(ids))
            is_all = len(self._events) < _NUM_EVENTS
            fits = is_all and text[: len(text) - num_held].lstrip() == sent.lstrip()  # some decoders drop a first space
        return text if fits else None

    def _without_text(self) -> tuple[list[int], set[int]]:
        """Tokens that came while everything was held back, and those that changed no text afterwards."""
        early: dict[int, None] = {}
        silent: set[int] = set()
        has_begun = False
        for event in (event for events, _ in self._events for event in _parsed(events)):
            ids = [token for choice in event.get("choices", ()) for token in choice.get("token_ids") or ()]
            has_begun = has_begun or bool(text_of(event))
            if not has_begun:
                early |= dict.fromkeys(ids)
            elif not text_of(event):
                silent.update(ids)
        return list(early), silent


def _parsed(events: bytes) -> list[JsonObject]:
    found: list[JsonObject] = []
    for line in events.splitlines():
        if line.startswith(b"data: {"):
            with suppress(orjson.JSONDecodeError):  # a part of an event that is too long to be kept whole
                found.append(orjson.loads(line.removeprefix(b"data: ")))
    return found


def text_of(event: JsonObject) -> str:
    """Of its first choice; empty where there is none."""
    choice: dict[str, Any] = (event.get("choices") or [{}])[0]
    return choice.get("text") or (choice.get("delta") or {}).get("content") or ""
