"""Whether two runs of greedy decoding gave equal tokens, on devices that round.

The order in which a GPU adds up depends on the size of the batch: FlashAttention cuts sequences into other parts where
a rank has fewer rows, and a matrix product of half the rows takes another kernel. So logits of the same token differ by
a rounding now and then, plain vLLM's own too when prompts are cut into other chunks. Where the two best tokens are
nearer to one another than that, either is right, and from there on the two answers have nothing to do with each other.

Hence the rule. **Two answers are equal if they are the same, or if, where they first differ, the reference's own logits
of the two tokens are at most one rounding step apart.** Anything wrong with a row, a block or a position moves logits
by whole numbers, not by steps. The step is that of the logit's own type: a logit of 8 to 16 has steps of 1/16 in
bfloat16. float32 has next to none, but Triton's attention multiplies it as TF32, so TF32's is taken. A model that caps
its logits softly divides, takes the tanh and multiplies, each time in the logit's type
(model_executor/layers/logits_processor.py): four roundings, four steps.

A control holds the rule itself to account: plain vLLM against plain vLLM with other chunks and smaller batches, as ours
has them, and, where our weights are divided in other parts than the reference's, of another tensor-parallel size. Where
the control differs by more than one step, so may we, by as much as it does.

Beside that stands how far the logits of all tokens that were compared are apart, as the root of the mean of their
squares: thousands of numbers where the rule above has a few dozen, of which it takes the largest. It decides nothing.
Rounding of another order leaves it about as large as the control's; anything wrong, however rare, does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MANTISSA_BITS = {"bfloat16": 7, "float32": 10}
"""float32 as TF32."""


@dataclass(frozen=True)
class Answer:
    """What one prompt was answered.

    Attributes:
        logits: at each position, those of the best tokens and of the chosen one, by token.
    """

    tokens: list[int]
    logits: list[dict[int, float]]


@dataclass(frozen=True)
class Difference:
    """Where an answer first differs from the reference's.

    Attributes:
        steps: between the reference's logits of the two tokens; infinite where the other one is not among its best.
    """

    prompt: int
    position: int
    steps: float


@dataclass(frozen=True)
class Comparison:
    """Of one run with its reference.

    Attributes:
        num_compared: tokens up to the first difference of each answer.
        rms_steps: between the logits of the best tokens there, in rounding steps.
    """

    num_answers: int
    num_tokens: int
    num_compared: int
    differences: list[Difference]
    rms_steps: float = 0.0

    @property
    def most_steps(self) -> float:
        """Of all first differences; 0 where there is none."""
        return max((difference.steps for difference in self.differences), default=0.0)


def step_at(logit: float, dtype: str) -> float:
    """Distance of a logit to the next that its type can hold."""
    return 2.0 ** (math.floor(math.log2(max(abs(logit), 1e-6))) - MANTISSA_BITS[dtype])


def compare(reference: Sequence[Answer], found: Sequence[Answer], dtype: str) -> Comparison:
    """Every answer of `found` with the same one of `reference`.

    Raises:
        ValueError: they are answers to other prompts.
    """
    if [len(a.tokens) for a in reference] != [len(a.tokens) for a in found]:
        raise ValueError(f"{len(found)} answers are compared with {len(reference)}, or with some of another length")
    differences, num_compared = [], 0
    squares: list[float] = []
    for number, (expected, answer) in enumerate(zip(reference, found, strict=True)):
        pairs = enumerate(zip(expected.tokens, answer.tokens, strict=True))
        first = next((position for position, (one, other) in pairs if one != other), None)
        num_compared += len(expected.tokens) if first is None else first
        for one, another in zip(expected.logits[:first], answer.logits[:first], strict=False):
            squares += [
                ((another[token] - one[token]) / step_at(one[token], dtype)) ** 2 for token in one.keys() & another
            ]
        if first is not None:
            best = expected.logits[first]
            chosen = best[expected.tokens[first]]
            other = best.get(answer.tokens[first], -math.inf)
            differences.append(Difference(number, first, (chosen - other) / step_at(chosen, dtype)))
    rms_steps = math.sqrt(sum(squares) / len(squares)) if squares else 0.0
    return Comparison(len(found), sum(len(a.tokens) for a in found), num_compared, differences, rms_steps)


def verdict(ours: Comparison, control: Comparison | None, num_roundings: int = 1) -> str | None:
    """What is wrong with our answers; None if they are equal to the reference's.

    Args:
        num_roundings: how often a logit is rounded, the last matrix product's own included.
    """
    allowed = max(float(num_roundings), control.most_steps if control is not None else 0.0)
    if ours.most_steps > allowed:
        worst = max(ours.differences, key=lambda difference: difference.steps)
        return (
            f"prompt {worst.prompt} differs at token {worst.position} by {worst.steps:.1f} rounding steps where "
            f"{allowed:.1f} are allowed"
        )
    if ours.num_compared < ours.num_tokens / 4:
        return f"only {ours.num_compared} of {ours.num_tokens} tokens could be compared, which says nothing"
    return None
