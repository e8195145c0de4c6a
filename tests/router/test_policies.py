"""Every policy is a pure function: what goes in, who comes out."""

from __future__ import annotations

from collections import Counter

import pytest
from pydantic import ValidationError

from router.candidates import Candidate, Query
from router.policies import load_policies
from router.policies.session_affinity import FREE_LOAD
from router.settings import RouterSettings
from tests.router.conftest import StartStack

POLICIES = load_policies()
QUERY = Query(num_prompt_tokens=100, num_sequence_tokens=200, num_tokens=200)


def candidates(*num_tokens: int, cached: tuple[int, ...] = ()) -> list[Candidate]:
    return [
        Candidate(i, f"http://e{i}:8000", 1, tokens, 0, cached[i] if cached else 0)
        for i, tokens in enumerate(num_tokens)
    ]


def chosen(policy: str, of: list[Candidate], query: Query = QUERY) -> int:
    return POLICIES[policy](of, query).position


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_returns_one_of_the_candidates(policy: str) -> None:
    for query in (QUERY, QUERY._replace(session="é\ud800", turn=7, draws=(0.999999, 0.999999))):
        for of in (candidates(0, 0), candidates(10**9, 0, 5), candidates(*range(9))):
            assert POLICIES[policy](of, query) in of


def test_least_loaded_counts_tokens_and_not_requests() -> None:
    few_long, many_short = candidates(90_000, 4_000)
    assert chosen("least_loaded", [few_long, many_short._replace(num_requests=40)]) == 1


def test_least_loaded_spreads_ties_over_the_engines() -> None:
    of = [c._replace(num_chosen=n) for c, n in zip(candidates(0, 0, 0), (3, 1, 2), strict=True)]
    assert chosen("least_loaded", of) == 1


def test_round_robin_takes_turns() -> None:
    of = candidates(5, 0, 9)
    assert [chosen("round_robin", of, QUERY._replace(turn=turn)) for turn in range(6)] == [0, 1, 2, 0, 1, 2]


def test_power_of_two_takes_the_better_of_two_different_engines() -> None:
    of = candidates(30, 20, 10)
    assert chosen("power_of_two", of, QUERY._replace(draws=(0.0, 0.0))) == 1  # engines 0 and 1 were drawn
    assert chosen("power_of_two", of, QUERY._replace(draws=(0.4, 0.0))) == 1  # 1 and 0
    assert chosen("power_of_two", of, QUERY._replace(draws=(0.4, 0.6))) == 2  # 1 and 2
    draws = [(i / 30, j / 30) for i in range(30) for j in range(30)]
    counts = Counter(chosen("power_of_two", of, QUERY._replace(draws=draw)) for draw in draws)
    assert counts == {2: 600, 1: 300}, "each pair is drawn equally often, and the worst of three never wins"


def test_prefix_aware_weighs_a_hit_against_the_load() -> None:
    query = QUERY._replace(num_prompt_tokens=1000)
    assert chosen("prefix_aware", candidates(0, 500, cached=(0, 900)), query) == 1
    assert chosen("prefix_aware", candidates(0, 950, cached=(0, 900)), query) == 0
    assert chosen("prefix_aware", candidates(20, 10, cached=(0, 0)), query) == 1


def test_a_session_stays_on_its_engine_and_sessions_spread() -> None:
    of = candidates(0, 0, 0, 0)
    homes = {s: chosen("session_affinity", of, QUERY._replace(session=f"user-{s}")) for s in range(400)}
    assert min(Counter(homes.values()).values()) > 60
    for session, home in homes.items():
        query = QUERY._replace(session=f"user-{session}", turn=session)
        assert chosen("session_affinity", of, query) == home
        without = [c for c in of if c.position != (home + 1) % 4]
        assert chosen("session_affinity", without, query) == home, "another engine went, and this session moved"


def test_a_session_leaves_an_engine_that_has_much_more_to_do_than_the_others() -> None:
    query = QUERY._replace(session="somebody")
    home = chosen("session_affinity", candidates(0, 0, 0), query)
    below, above = [0, 0, 0], [10 * FREE_LOAD] * 3
    below[home], above[home] = FREE_LOAD, 16 * FREE_LOAD
    assert chosen("session_affinity", candidates(*below), query) == home
    assert chosen("session_affinity", candidates(*above), query) != home


def test_without_a_session_affinity_is_least_loaded() -> None:
    assert chosen("session_affinity", candidates(30, 10, 20)) == 1


def test_an_unknown_policy_is_refused_with_the_names_that_there_are() -> None:
    with pytest.raises(ValidationError, match="least_loaded, power_of_two, prefix_aware, round_robin"):
        RouterSettings(decode_policy="fastest")


def test_each_role_has_its_own_policy(start_stack: StartStack) -> None:
    stack = start_stack(3, 3, prefill_policy="round_robin", decode_policy="session_affinity")
    for _ in range(6):
        assert stack.router.complete(headers={"X-Session-Id": "s1"}).status == 200
    assert [len(engine.seen) for engine in stack.prefill] == [2, 2, 2]
    assert sorted(len(engine.seen) for engine in stack.decode) == [0, 0, 6]
    for _ in range(4):
        assert stack.router.complete(user="u1").status == 200
    assert sorted(len(engine.seen) for engine in stack.decode) in ([0, 0, 10], [0, 4, 6])


def test_prompts_with_one_beginning_meet_on_one_engine(start_stack: StartStack) -> None:
    stack = start_stack(2, 2, prefill_policy="prefix_aware", decode_policy="prefix_aware")
    documents = ["one " * 500, "two " * 500]
    for turn in range(5):
        for document in documents:
            assert stack.router.complete(prompt=f"{document}. Question {turn}?").status == 200
    for engine in stack.prefill + stack.decode:
        assert len(engine.seen) == 5
        assert len({seen.body["prompt"][:4] for seen in engine.seen}) == 1
