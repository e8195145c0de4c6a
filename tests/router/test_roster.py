from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from router.choice import Chooser
from router.engines import Engine, EnginePool
from router.errors import EngineFailure, FailureKind
from router.fit import misfit
from router.settings import RouterSettings
from router.types import Endpoint, JsonObject, Role

MODELS: tuple[dict[str, JsonObject], ...] = ({"a": {}}, {"a": {"max_model_len": 64}, "b": {}}, {"b": {}})
TRAITS: tuple[dict[str, str], ...] = ({}, {"block_size": "16"}, {"block_size": "32"})


def make_pool(num_each: int) -> EnginePool:
    urls = [f"http://127.0.0.1:{1000 + i}" for i in range(2 * num_each)]
    settings = RouterSettings(prefill_urls=tuple(urls[:num_each]), decode_urls=tuple(urls[num_each:]))
    return EnginePool(settings.endpoints, Chooser(settings), breaker_failures=2)


def alive_now(pool: EnginePool, role: Role, model: str) -> list[Engine]:
    """What the roster keeps, found out anew."""
    mine = [e for e in pool.engines if e.endpoint.role is role and e.is_up and not e.is_draining and model in e.models]
    return [e for e in mine if not e.breaker.is_open] or mine


def changes(draw: random.Random, pool: EnginePool) -> list[Callable[[], object]]:
    """Everything that can happen to an engine, to one that is drawn."""
    engine = draw.choice(pool.engines)
    dies = draw.choice(list(FailureKind))
    new = Endpoint(draw.choice(list(Role)), f"http://127.0.0.1:{draw.randrange(5000, 60000)}")

    def fail() -> None:
        for _ in range(2):
            engine.suspect(EngineFailure(engine.endpoint, dies, "it failed"))

    return [
        lambda: engine.mark_up(draw.choice(MODELS), draw.choice(TRAITS)),
        lambda: engine.mark_down("it is down"),
        lambda: setattr(engine, "is_paused", not engine.is_paused),
        lambda: setattr(engine, "is_leaving", not engine.is_leaving),
        fail,
        engine.succeeded,
        engine.proved,
        lambda: pool.remove(engine) if len(pool.engines) > 4 else pool.add(new),
    ]


@pytest.mark.parametrize("seed", range(5))
def test_it_is_never_out_of_date(seed: int) -> None:
    draw, pool = random.Random(seed), make_pool(3)
    num_changed = 0
    before = None
    for _ in range(500):
        draw.choice(changes(draw, pool))()
        decode = [e for e in pool.engines if e.endpoint.role is Role.DECODE]
        assert pool.models() == {name: card for e in decode if e.is_up for name, card in e.models.items()}
        for model in ("a", "b"):
            roster = pool.roster(model)
            alive = {role: alive_now(pool, role, model) for role in Role}
            assert {role: list(roster.of(role)) for role in Role} == alive
            readers = {p: [d for d in alive[Role.DECODE] if misfit(p, d) is None] for p in alive[Role.PREFILL]}
            assert {p: list(roster.readers(p)) for p in readers} == readers
            assert list(roster.readable) == [p for p, found in readers.items() if found]
        num_changed += alive != before
        before = alive
    assert num_changed > 20, "hardly anything happened"


def test_it_is_kept_while_nothing_changes_and_only_for_models_that_somebody_serves() -> None:
    pool = make_pool(1)
    for engine in pool.engines:
        engine.mark_up({"a": {}}, {})
    kept = pool.roster("a")
    for engine in pool.engines:
        engine.mark_up({"a": {}}, {})  # as each health check does
        engine.succeeded()
    assert pool.roster("a") is kept
    assert pool.roster("whatever a client sends") is not pool.roster("whatever a client sends")
    pool.engines[0].mark_down("it is down")
    assert pool.roster("a") is not kept
