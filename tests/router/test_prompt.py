from __future__ import annotations

from typing import Any

import pytest

from router.prompt import prompt_fields
from router.types import Api, JsonObject, Task

ITEMS = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("api", "body", "expected"),
    [
        (Api.COMPLETIONS, {"prompt": "a", "messages": 5, "tools": 6}, {"prompt": "a"}),
        (Api.CHAT, {"messages": ITEMS, "tools": [], "prompt": 5}, {"messages": ITEMS, "tools": []}),
        (Api.RESPONSES, {"input": "a", "prompt": 5, "messages": 5}, {"prompt": "a"}),
        (Api.RESPONSES, {"input": ITEMS, "cache_salt": "s"}, {"messages": ITEMS, "cache_salt": "s"}),
        (Task.TOKENIZE, {"prompt": [None], "messages": 5}, {}),
    ],
)
def test_only_the_apis_own_fields_are_the_prompt(api: Any, body: JsonObject, expected: JsonObject) -> None:
    assert prompt_fields(api, body) == expected
