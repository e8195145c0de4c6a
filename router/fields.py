"""Checks of single JSON values. Each raises InvalidRequest that names the field, what it is and what it must be.

A bool is not an int here, as in OpenAI's API, although it is one in Python.
"""

from __future__ import annotations

import reprlib
from typing import Any, NoReturn

from router.errors import InvalidRequest
from router.types import JsonObject

INT64 = 2**63


def refuse(param: str, must: str, value: Any) -> NoReturn:
    shown = reprlib.repr(value)  # which does not write out millions of tokens to cut them off again
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    raise InvalidRequest(f"{param} must be {must}, not {shown}.", param=param, logged=f"{param} must be {must}.")


def check_int(body: JsonObject, name: str, low: int, high: int = INT64 - 1) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int or not low <= value <= high:
        refuse(
            name, f"an integer of at least {low}" if high == INT64 - 1 else f"an integer from {low} to {high}", value
        )
    return value


def check_number(body: JsonObject, name: str, low: float, high: float, *, low_is_allowed: bool = True) -> None:
    value = body.get(name)
    if value is None:
        return
    fits = type(value) in (int, float) and (low <= value if low_is_allowed else low < value) and value <= high
    if not fits:
        bounds = f"from {low:g} to {high:g}" if low_is_allowed else f"above {low:g} and at most {high:g}"
        refuse(name, f"a number {bounds}", value)


def check_bool(body: JsonObject, name: str) -> bool:
    value = body.get(name)
    if value is None:
        return False
    if type(value) is not bool:
        refuse(name, "true or false", value)
    return bool(value)


def check_stop(body: JsonObject) -> None:
    value = body.get("stop")
    texts = [value] if isinstance(value, str) else value
    if texts is None:
        return
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        refuse("stop", "a non-empty string or a list of them", value)


def check_prompt(prompt: Any) -> int:
    """Returns the number of prompts in it: text, texts, token ids, or lists of token ids."""
    if isinstance(prompt, str) and prompt:
        return 1
    if isinstance(prompt, list) and prompt:
        kinds = set(map(type, prompt))
        if kinds == {int} and _are_tokens(prompt):
            return 1
        if kinds == {str} and all(prompt):
            return len(prompt)
        if kinds == {list} and all(set(map(type, ids)) == {int} and _are_tokens(ids) for ids in prompt):
            return len(prompt)
    refuse("prompt", "a non-empty string, a list of token ids >= 0, or a list of those", prompt)


def check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        refuse("messages", "a non-empty list of objects", messages)
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            refuse(f"messages[{index}]", "an object", message)
        if not isinstance(message.get("role"), str):
            refuse(f"messages[{index}].role", "a string", message.get("role"))


def check_input(value: Any) -> None:
    """The input of the Responses API: text, or a list of items."""
    if isinstance(value, str):
        return
    if not isinstance(value, list) or not value:
        refuse("input", "a string or a non-empty list of objects", value)
    for index, item in enumerate(value):
        if not isinstance(item, dict):
            refuse(f"input[{index}]", "an object", item)


def _are_tokens(ids: list[int]) -> bool:
    return min(ids) >= 0 and max(ids) < INT64
