"""Other names for models: a client may ask for `gpt-4o` and be served by whatever the operator runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from router.types import JsonObject


def resolve(body: JsonObject, aliases: Mapping[str, str]) -> None:
    """Puts the served model's name in place of an alias. The answer then names the served model."""
    model = body.get("model")
    if isinstance(model, str) and model in aliases:
        body["model"] = aliases[model]


def with_aliases(models: Mapping[str, JsonObject], aliases: Mapping[str, str]) -> dict[str, JsonObject]:
    """The model cards by name, with one more for each alias of a model that is served."""
    cards = {
        alias: {**models[model], "id": alias, "root": model} for alias, model in aliases.items() if model in models
    }
    return {**models, **cards}
