from __future__ import annotations

from typing import Any

import pytest

from router.prefix import BLOCK_BYTES, BLOCK_TOKENS, MAX_BLOCKS, PrefixIndex, prefix_blocks


def blocks(**body: Any) -> tuple[int, ...]:
    return prefix_blocks("m", body)[0]


def shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    index = PrefixIndex(10_000)
    index.insert(one)
    return index.match(other)


def test_a_block_stands_for_everything_before_it() -> None:
    same, first = "a" * BLOCK_BYTES, "b" + "a" * (BLOCK_BYTES - 1)
    assert len(set(blocks(prompt=same * 5))) == 5, "equal text at another place is another prefix"
    assert shared(blocks(prompt=same * 5), blocks(prompt=same * 3 + "c" * 900)) == 3
    assert shared(blocks(prompt=same * 5), blocks(prompt=first + same * 4)) == 0


def test_only_what_can_share_kv_is_equal() -> None:
    text = "a" * 1000
    assert shared(blocks(prompt=text), blocks(prompt=text)) == 3
    assert shared(blocks(prompt=text), prefix_blocks("another", {"prompt": text})[0]) == 0
    assert shared(blocks(prompt=text), blocks(prompt=text, cache_salt="s")) == 0
    assert shared(blocks(prompt=text), blocks(prompt=[text])) == 3
    assert shared(blocks(prompt=text), blocks(prompt=text, cache_salt=[{}])) == 0


def test_token_ids_have_blocks_of_their_own() -> None:
    ids = list(range(10 * BLOCK_TOKENS + 5))
    assert shared(blocks(prompt=ids), blocks(prompt=[ids])) == 10
    assert shared(blocks(prompt=ids), blocks(prompt=[*ids[: 4 * BLOCK_TOKENS], *ids])) == 4


@pytest.mark.parametrize("prompt", [None, "", "short", ["a" * 999, "b"], [[1] * 99, [2]]])
def test_what_is_not_one_prompt_has_no_blocks(prompt: Any) -> None:
    assert blocks(prompt=prompt) == ()


def test_the_next_turn_of_a_conversation_begins_like_the_one_before() -> None:
    messages = [{"role": "user", "content": "é" * 600}]
    longer = [*messages, {"role": "assistant", "content": "b" * 600}, {"role": "user", "content": "c"}]
    before = blocks(messages=messages)
    assert shared(before, blocks(messages=longer)) == len(before) == 4
    tools = [{"type": "function"}]
    assert shared(before, blocks(messages=longer, tools=tools)) == 0


def test_the_share_of_a_block_adds_up_to_the_prompt() -> None:
    found, share = prefix_blocks("m", {"prompt": "a" * (4 * BLOCK_BYTES)})
    assert len(found) * share == 1.0


def test_a_very_long_prompt_is_cut() -> None:
    assert len(blocks(prompt="a" * (2 * MAX_BLOCKS * BLOCK_BYTES))) == MAX_BLOCKS


def test_the_index_forgets_the_least_recently_used_and_ends_first() -> None:
    index = PrefixIndex(max_blocks=6)
    index.insert((1, 2, 3))
    index.insert((1, 2, 4))
    index.insert((7, 8))
    assert len(index) == 6
    index.insert((9,))
    assert index.match((1, 2, 3)) == 2, "the end of the oldest went, not what others share"
    assert index.match((1, 2, 4)) == 3
    index.insert((1, 2))
    index.insert((10, 11))
    assert (index.match((1, 2, 4)), index.match((7, 8)), index.match((9,))) == (2, 1, 1)
    index.insert(range(100, 200))
    assert len(index) == 6
    assert index.match(range(100, 200)) == 6
    index.clear()
    assert (len(index), index.match((100,))) == (0, 0)
