"""What a request will ask of the engines, in tokens: guessed from its body, and exact once an engine has counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from router.types import JsonObject

BYTES_PER_TOKEN = 4.0  # of English text with a vocabulary of 32,000 and more; what engines count corrects it
MESSAGE_TOKENS = 4  # what a chat template puts around each message, about
_NEWEST = 0.05  # weight of the newest count in the running mean


@dataclass(slots=True)
class Demand:
    """One request's, for as long as it runs."""

    num_prompt_tokens: int = 0
    num_output_tokens: int = 0  # of each choice, at most
    num_choices: int = 1
    num_prompt_bytes: int = 0  # what num_prompt_tokens was guessed from; 0 if it is a count
    session: str | None = None
    prefix: tuple[int, ...] = ()  # chained hashes of the prompt's blocks; empty if no policy needs them
    prefix_share: float = 0.0  # of the prompt, that one of those blocks is
    is_plain: bool = True  # token ids alone say what its KV is: no adapter, no salt, nothing but text
    token_ids: Sequence[int] | None = None  # of a plain prompt, if they are known
    max_uncached_tokens: int | None = None  # set if it skips the remote prefill because a decode engine has the rest

    @property
    def num_sequence_tokens(self) -> int:
        """Tokens of KV cache that each choice grows to, at most."""
        return self.num_prompt_tokens + self.num_output_tokens

    @property
    def num_total_tokens(self) -> int:
        """Tokens that count as outstanding on the decode engine; on a prefill engine it is the prompt's."""
        return self.num_choices * self.num_sequence_tokens


class TokenEstimator:
    """Bytes per token by model: a running mean over what prefill engines counted. Bounded by the models served."""

    def __init__(self) -> None:
        self._bytes_per_token: dict[str, float] = {}

    def num_tokens(self, model: str, num_bytes: int) -> int:
        return ceil(num_bytes / self._bytes_per_token.get(model, BYTES_PER_TOKEN))

    def observe(self, model: str, num_bytes: int, num_tokens: int) -> None:
        if num_bytes <= 0 or num_tokens <= 0:
            return
        before = self._bytes_per_token.get(model, BYTES_PER_TOKEN)
        # A long prompt says more than a short one, most of which may be the template.
        weight = _NEWEST * min(1.0, num_tokens / 64)
        self._bytes_per_token[model] = max(0.25, before + weight * (num_bytes / num_tokens - before))


def prompt_size(body: JsonObject) -> tuple[int, int]:
    """(tokens that need no guess, bytes of text) of a validated body's prompt."""
    messages = body.get("messages")
    if isinstance(messages, list):
        return MESSAGE_TOKENS * len(messages), sum(_content_bytes(message) for message in messages)
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return 0, _text_bytes(prompt)
    if not isinstance(prompt, list) or not prompt:
        return 0, 0
    if isinstance(prompt[0], int):
        return len(prompt), 0
    if isinstance(prompt[0], str):
        return 0, sum(map(_text_bytes, prompt))
    return sum(map(len, prompt)), 0


def is_plain(body: JsonObject, card: JsonObject) -> bool:
    """Whether the prompt's token ids alone say what its KV cache is. `card` is vLLM's of the model."""
    if card.get("parent") is not None or body.get("cache_salt") is not None:
        return False
    contents = (message.get("content") for message in body.get("messages") or ())
    parts = (part for content in contents if isinstance(content, list) for part in content)
    return all(isinstance(part, dict) and part.get("type") == "text" for part in parts)


def given_token_ids(body: JsonObject) -> list[int] | None:
    """The prompt, if it came as one list of token ids."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], list):
        (prompt,) = prompt
    return prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], int) else None


def output_budget(body: JsonObject, num_prompt_tokens: int, context: int | None, default: int) -> int:
    """Tokens that one choice may grow by: what the client allows, `default` if it does not say, within the context."""
    names = ("max_completion_tokens", "max_tokens", "max_output_tokens")
    wanted = next((body[name] for name in names if body.get(name) is not None), None)
    budget = wanted if isinstance(wanted, int) else default
    return budget if context is None else max(0, min(budget, context - num_prompt_tokens))


def _content_bytes(message: Any) -> int:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str):
        return _text_bytes(content)
    if isinstance(content, list):
        texts = (part.get("text") for part in content if isinstance(part, dict))
        return sum(_text_bytes(text) for text in texts if isinstance(text, str))
    return 0


def _text_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
