"""Which prompts' beginnings an engine has cached, by its own word: built from vLLM's KV cache events.

vLLM's block hashes depend on its settings and its hash seed, so they are not computed here. An event that stores blocks
names their hashes and their token ids; the token ids give a key of our own, by which prompts are looked up, and the
hashes say later which of them are gone (vllm/distributed/kv_events.py, v1/core/block_pool.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from router.types import JsonObject

BlockHash = bytes | int

_ROOT = 0


class EventIndex:
    """One engine's blocks. It is as large as the engine's cache has blocks, and no larger: about 200 bytes each."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size  # tokens
        self._keys: dict[BlockHash, int] = {}  # vLLM's hash -> our key
        self._hashes: dict[int, BlockHash] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def apply(self, event: JsonObject) -> None:
        """Raises KeyError or TypeError if it is not an event of vLLM's."""
        kind = event["type"]
        if kind == "AllBlocksCleared":
            self.clear()
        elif kind == "BlockRemoved":
            # An engine with several ranks may have a block on another rank still: the index forgets it too early,
            # which costs a hit and not an answer.
            for block_hash in event["block_hashes"]:
                self._hashes.pop(self._keys.pop(block_hash, _ROOT), None)
        elif kind == "BlockStored":
            self._store(event)

    def match(self, token_ids: Sequence[int]) -> int:
        """Tokens at the beginning of the prompt that are cached."""
        key, size = _ROOT, self.block_size
        for begin in range(0, len(token_ids) - size + 1, size):
            key = hash((key, tuple(token_ids[begin : begin + size])))
            if key not in self._hashes:
                return begin
        return len(token_ids) // size * size

    def clear(self) -> None:
        self._keys.clear()
        self._hashes.clear()

    def _store(self, event: JsonObject) -> None:
        hashes, token_ids, size = event["block_hashes"], event["token_ids"], self.block_size
        if not self._is_plain(event) or len(token_ids) != len(hashes) * size:
            return
        parent = event["parent_block_hash"]
        key = _ROOT if parent is None else self._keys.get(parent)
        if key is None:  # the parent is gone, or was stored before anybody listened: nothing can be matched below it
            return
        for index, block_hash in enumerate(hashes):
            key = hash((key, tuple(token_ids[index * size : (index + 1) * size])))
            self._keys[block_hash] = key
            self._hashes[key] = block_hash

    def _is_plain(self, event: JsonObject) -> bool:
        """Whether token ids alone say what the blocks hold, and a prefill would find them on the accelerator.

        Not with an adapter, an image, a salt, another block size, or in a second group of layers, whose blocks come
        along with the first's.
        """
        return (
            event["block_size"] == self.block_size
            and event.get("group_idx") in (None, 0)
            and event.get("medium") in (None, "GPU")
            and event.get("lora_name") is None
            and not any(event.get("extra_keys") or ())
        )
