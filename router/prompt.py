"""What of a request's body is its prompt, whichever API it came by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from router.types import Api

if TYPE_CHECKING:
    from router.types import JsonObject, Task

_FIELDS = {Api.COMPLETIONS: ("prompt",), Api.CHAT: ("messages", "tools"), Api.RESPONSES: ("input", "tools")}


def prompt_fields(api: Api | Task, body: JsonObject) -> JsonObject:
    """As `prompt`, or as `messages` and `tools`, with the cache's salt; empty for a task.

    Nothing else of a body may be looked at as a prompt: a field that belongs to another API was not checked.
    """
    names = _FIELDS.get(api, ()) if isinstance(api, Api) else ()
    found = {name: body[name] for name in (*names, "cache_salt") if name in body}
    if "input" in found:
        given = found.pop("input")
        found["prompt" if isinstance(given, str) else "messages"] = given
    return found
