"""Whether the remote prefill is worth its hand-off: one pure function."""

from __future__ import annotations

from collections.abc import Iterable

from router.types import LocalPrefill


def local_prefill(num_prompt_tokens: int, cached: Iterable[int], threshold: int) -> LocalPrefill | None:
    """Why a decode engine should compute the prompt itself: what it lacks of it is at most `threshold` tokens.

    A chunk of that size disturbs the others on the decode engine less than a hand-off costs this request.

    Args:
        num_prompt_tokens: of the request's prompt.
        cached: tokens of it that each decode engine has cached, as far as is known.
        threshold: tokens; 0 switches it off.
    """
    if threshold <= 0:
        return None
    if num_prompt_tokens <= threshold:
        return LocalPrefill.SHORT_PROMPT
    if num_prompt_tokens - max(cached, default=0) <= threshold:
        return LocalPrefill.CACHED_PROMPT
    return None
