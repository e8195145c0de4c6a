"""Which prompts' beginnings an engine has probably cached, guessed from what this router sent it.

A prompt is cut into blocks, and each block's hash contains the one before it: a hash stands for a whole prefix, and the
radix tree of all prompts is a flat set of hashes. Per engine that set is kept like the engine keeps its cache, least
recently used last, in bounded memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import orjson

if TYPE_CHECKING:
    from router.types import JsonObject

BLOCK_BYTES = 256  # of text: 64 tokens, 2 to 4 of vLLM's blocks
BLOCK_TOKENS = 64  # of a prompt that comes as token ids
MAX_BLOCKS = 1024  # the prefix that is looked at ends there: 256 KiB of text


def prefix_blocks(model: str, body: JsonObject) -> tuple[tuple[int, ...], float]:
    """The chained hashes of one prompt's full blocks, and the share of the prompt that each of them is.

    Empty for what is not one prompt. A conversation's next turn begins with the blocks of the one before.
    """
    prompt = _prompt(body)
    if not prompt:
        return (), 0.0
    size = BLOCK_BYTES if isinstance(prompt, bytes) else BLOCK_TOKENS
    num_blocks = min(len(prompt) // size, MAX_BLOCKS)
    blocks: list[int] = []
    block = hash((model, str(body.get("cache_salt"))))  # a salt that is no string is the engine's to refuse
    for begin in range(0, num_blocks * size, size):
        part = prompt[begin : begin + size]
        block = hash((block, part if isinstance(part, bytes) else tuple(part)))
        blocks.append(block)
    return tuple(blocks), size / len(prompt)


def _prompt(body: JsonObject) -> bytes | list[int] | None:
    messages = body.get("messages")
    if messages is not None:
        tools = body.get("tools")  # templates put them first
        return (b"" if tools is None else orjson.dumps(tools)) + orjson.dumps(messages)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        (prompt,) = prompt
    if isinstance(prompt, str):
        return prompt.encode()
    return prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], int) else None


class PrefixIndex:
    """The prefixes of one engine."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def insert(self, blocks: Sequence[int]) -> None:
        # The last block first: so a prefix is always more recent than what continues it, and never evicted before.
        for block in reversed(blocks):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._max_blocks:
            self._blocks.popitem(last=False)

    def match(self, blocks: Sequence[int]) -> int:
        """How many of the blocks are here, counted from the first; by bisection, because they are here without gaps."""
        low, high = 0, len(blocks)
        while low < high:
            middle = (low + high + 1) // 2
            if blocks[middle - 1] in self._blocks:
                low = middle
            else:
                high = middle - 1
        return low

    def clear(self) -> None:
        self._blocks.clear()
