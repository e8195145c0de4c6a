"""The rule by which tokens on GPUs are called equal. Needs no GPU."""

from __future__ import annotations

import pytest

from tests.gpu.cases import CASES
from tests.gpu.compare import Answer, Comparison, Difference, compare, step_at, verdict
from tests.gpu.engine import EngineSpec, prompts
from tests.gpu.running import Devices


def test_steps_are_those_of_the_type() -> None:
    assert step_at(9.0, "bfloat16") == step_at(-15.9, "bfloat16") == 1 / 16
    assert step_at(5.0, "bfloat16") == 1 / 32
    assert step_at(9.0, "float32") == 1 / 128


def test_answers_are_compared_up_to_their_first_difference() -> None:
    reference = [
        Answer([1, 2, 3], [{1: 9.0}, {2: 9.0, 7: 8.9375}, {3: 9.0}]),
        Answer([4, 5], [{4: 9.0}, {5: 9.0, 6: 8.0}]),
        Answer([8], [{8: 9.0}]),
    ]
    found = [Answer([1, 7, 9], []), Answer([4, 6], []), Answer([8], [])]
    comparison = compare(reference, found, "bfloat16")
    assert comparison == Comparison(3, 6, 3, [Difference(0, 1, 1.0), Difference(1, 1, 16.0)])
    with pytest.raises(ValueError, match="another length"):
        compare(reference, [*found[:2], Answer([8, 8], [])], "bfloat16")


def test_how_far_logits_are_apart_counts_where_the_answers_are_the_same() -> None:
    reference = [Answer([1, 2], [{1: 9.0, 4: 8.0}, {2: 9.0}]), Answer([3], [{3: 9.0}])]
    found = [Answer([1, 5], [{1: 9.0625, 4: 8.0625}, {5: 20.0}]), Answer([3], [{3: 9.125, 6: 1.0}])]
    assert compare(reference, found, "bfloat16").rms_steps == pytest.approx(((1 + 1 + 4) / 3) ** 0.5)
    assert compare(reference, reference, "bfloat16").rms_steps == 0.0


def test_a_token_that_is_not_among_the_reference_s_best_is_no_tie() -> None:
    comparison = compare([Answer([1], [{1: 9.0, 2: 9.0}])], [Answer([3], [])], "bfloat16")
    assert verdict(comparison, None) is not None


def test_one_step_is_a_tie_and_so_is_what_plain_vllm_differs_by_from_itself() -> None:
    def differing(steps: float, compared: int = 100) -> Comparison:
        return Comparison(2, 100, compared, [Difference(1, 50, steps)])

    assert verdict(differing(1.0), differing(0.0)) is None
    assert "prompt 1 differs at token 50 by 2.0 rounding steps where 1.0" in str(
        verdict(differing(2.0), differing(1.0))
    )
    assert verdict(differing(2.0), differing(2.0)) is None
    assert verdict(differing(4.0), differing(0.0), num_roundings=4) is None
    assert "4.0 are allowed" in str(verdict(differing(5.0), differing(0.0), num_roundings=4))
    assert "could be compared" in str(verdict(differing(1.0, compared=24), None))


def test_each_engine_is_one_thing() -> None:
    known: dict[str, EngineSpec] = {}
    for engine in (engine for case in CASES for engine in case.engines):
        assert known.setdefault(engine.name, engine) == engine
    assert len({case.ours.name for case in CASES}) == len(CASES)


def test_prompts_share_prefixes_and_are_cut_into_chunks() -> None:
    given = prompts()
    assert len({tuple(prompt[:160]) for prompt in given[::5]}) == 1
    assert sum(len(prompt) > 128 for prompt in given) > 20
    assert max(map(len, given)) + 64 <= 512


def test_gpus_are_lent_to_one_of_ours_or_to_some_plain_engines() -> None:
    devices = Devices(3)
    with devices.lent(2) as ours, devices.lent(1) as plain, devices.lent(1) as another:
        assert sorted(ours + plain) == [0, 1, 2]
        assert another == plain
    with devices.lent(1) as one, devices.lent(1) as other:
        assert one != other
    with devices.lent(3) as all_of_them:
        assert all_of_them == [0, 1, 2]
