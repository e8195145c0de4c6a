"""Conversations: every turn asks with all that was said, the engine's answers too, and a little more."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from tests.e2e.processes import MODEL_LENGTH
from tests.e2e.suite import Ask, completion, tokens

NUM_AT_ONCE = 8
NUM_NEW = 40  # tokens that a turn adds
NUM_ANSWERED = 100
"""Tokens of an answer: more than a router that pulls back wants to find on a decode engine."""


@dataclass(eq=False)
class Conversation:
    """`number` says what is asked, so that the same one asked again must be answered the same."""

    number: int
    said: list[int] = field(default_factory=list)

    def turn(self) -> Ask:
        new = tokens(NUM_NEW, 10_000 * self.number + len(self.said))
        return completion([*self.said, *new], NUM_ANSWERED)

    def hear(self, prompt: list[int], answer: tuple[int, ...]) -> None:
        """The answer to a turn; nothing changes if another client asked it as well and was faster."""
        if len(prompt) == len(self.said) + NUM_NEW:
            self.said = [*prompt, *answer]

    @property
    def is_over(self) -> bool:
        """Whether the model's context has no room for another turn."""
        return len(self.said) + NUM_NEW + NUM_ANSWERED > MODEL_LENGTH


class Conversations:
    """Those under way."""

    def __init__(self, rng: random.Random) -> None:
        self._random = rng
        self._open: list[Conversation] = []
        self._num_begun = 0

    def pick(self) -> Conversation:
        """One whose next turn is due. Some begin as one before did, which engines may still have cached."""
        self._open = [conversation for conversation in self._open if not conversation.is_over]
        if len(self._open) < NUM_AT_ONCE:
            if self._num_begun and self._random.random() < 0.3:
                number = self._random.randrange(self._num_begun)
            else:
                number, self._num_begun = self._num_begun, self._num_begun + 1
            self._open.append(Conversation(number))
        return self._random.choice(self._open)
