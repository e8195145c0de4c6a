from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import pytest

from router.types import Role
from tests.router.running import RunningRouter, running_router, wait_for
from tests.router.scripted_engine import ScriptedEngine, engine_loop


@dataclass
class Stack:
    """A router with scripted engines behind it."""

    router: RunningRouter
    prefill: list[ScriptedEngine]
    decode: list[ScriptedEngine]

    @property
    def num_seen(self) -> int:
        """Generation requests that reached any engine."""
        return sum(len(engine.seen) for engine in self.prefill + self.decode)


StartStack = Callable[..., Stack]


@pytest.fixture(scope="session")
def loop_of_engines() -> Iterator[asyncio.AbstractEventLoop]:
    with engine_loop() as loop:
        yield loop


@pytest.fixture
def start_stack(loop_of_engines: asyncio.AbstractEventLoop) -> Iterator[StartStack]:
    """Call it with the numbers of engines and the router's settings."""
    with ExitStack() as cleanup:

        def start(
            num_prefill: int = 1,
            num_decode: int = 1,
            kv_traits: Sequence[dict[str, str] | None] = (),
            events: Sequence[bytes | None] = (),
            kv_peer: dict[str, Any] | None = None,
            kv_roles: Sequence[Role] | None = None,
            **settings: Any,
        ) -> Stack:
            roles = [Role.PREFILL] * num_prefill + [Role.DECODE] * num_decode
            engines = [ScriptedEngine(loop_of_engines, role) for role in roles]
            for engine, traits, told in zip_longest(engines, kv_traits, events):
                engine.kv_traits, engine.kv_events, engine.kv_peer = traits, told, kv_peer
                engine.kv_roles = kv_roles and {"roles": kv_roles}
                engine.revive()
                cleanup.callback(engine.kill)
            router = cleanup.enter_context(running_router(engines, **settings))
            return Stack(router, engines[:num_prefill], engines[num_prefill:])

        yield start


@pytest.fixture
def stack(start_stack: StartStack) -> Iterator[Stack]:
    """One engine of each role. At the end, whatever the test did, no request may be left over."""
    found = start_stack()
    yield found
    wait_for(found.router.is_idle)
