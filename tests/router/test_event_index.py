from __future__ import annotations

from typing import Any

import pytest

from router.event_index import EventIndex

PROMPT = list(range(100, 132))  # 8 blocks of 4


def stored(first: int, num_blocks: int, tokens: list[int] = PROMPT, **fields: Any) -> dict[str, Any]:
    """As vLLM tells that blocks from number `first` on were stored; the hashes are of their whole prefix."""
    hashes = [str(tokens[: (i + 1) * 4]).encode() for i in range(first, first + num_blocks)]
    parent = str(tokens[: first * 4]).encode() if first else None
    ids = tokens[first * 4 : (first + num_blocks) * 4]
    event = {"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent, "token_ids": ids}
    return {**event, "block_size": 4, "medium": "GPU", "lora_id": None, "lora_name": None, **fields}


def removed(number: int) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": [str(PROMPT[: (number + 1) * 4]).encode()], "medium": "GPU"}


def index(*events: dict[str, Any]) -> EventIndex:
    made = EventIndex(4)
    for event in events:
        made.apply(event)
    return made


def test_a_prompt_is_matched_as_far_as_its_blocks_are_stored() -> None:
    found = index(stored(0, 2), stored(2, 1))
    assert found.match(PROMPT) == 12
    assert found.match(PROMPT[:10]) == 8, "half a block is no block"
    assert found.match(PROMPT[:3]) == 0
    assert found.match([*PROMPT[:4], 0, *PROMPT[5:]]) == 4
    assert found.match(PROMPT[4:]) == 0, "the same block at another place is another prefix"


def test_what_was_removed_is_not_matched_nor_what_follows_it() -> None:
    found = index(stored(0, 8), removed(5))
    assert found.match(PROMPT) == 20
    found.apply(removed(0))
    assert found.match(PROMPT) == 0
    found.apply(stored(0, 1))
    assert found.match(PROMPT) == 20, "its children are still there"
    found.apply({"type": "AllBlocksCleared"})
    assert (found.match(PROMPT), len(found)) == (0, 0)


def test_memory_is_given_back() -> None:
    found = index(stored(0, 8), *(removed(i) for i in range(8)), removed(3))
    assert len(found) == len(found._hashes) == 0


def test_blocks_below_an_unknown_one_are_left_out() -> None:
    assert len(index(stored(3, 2))) == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_name": "adapter"},
        {"extra_keys": [None, ("salt",)]},
        {"medium": "CPU"},
        {"group_idx": 1},
        {"block_size": 2},
        {"token_ids": [1, 2, 3]},
    ],
)
def test_blocks_that_token_ids_alone_do_not_say_are_left_out(fields: dict[str, Any]) -> None:
    assert len(index(stored(0, 2, **fields))) == 0


@pytest.mark.parametrize("fields", [{"extra_keys": [None, None]}, {"group_idx": 0}, {"medium": None}])
def test_ordinary_blocks_are_kept(fields: dict[str, Any]) -> None:
    assert index(stored(0, 2, **fields)).match(PROMPT) == 8
