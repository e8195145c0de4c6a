"""Loaded by schemathesis. JSON Schema takes 1.0 for an integer; OpenAI and this router take it for a decimal number."""

from __future__ import annotations

from typing import Any

import schemathesis


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    return _with_plain_integers(body)


def _with_plain_integers(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_plain_integers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_plain_integers(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value
