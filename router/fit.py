"""Whether a decode engine can read a prefill engine's KV cache, as far as the engines tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from router.engines import Engine


def misfit(prefill: Engine, decode: Engine) -> str | None:
    """What differs and must not, in one clause; None if nothing does.

    An engine that tells no traits, such as a stock vLLM server, fits: the handshake of the engines has the last word.
    """
    shared = prefill.kv_traits.keys() & decode.kv_traits.keys()
    differing = sorted(name for name in shared if prefill.kv_traits[name] != decode.kv_traits[name])
    if not differing:
        return None
    clauses = [f"{name} is {prefill.kv_traits[name]} and {decode.kv_traits[name]}" for name in differing]
    return f"{prefill.endpoint.name} (prefill) and {decode.endpoint.name} (decode) don't fit: {', '.join(clauses)}"
