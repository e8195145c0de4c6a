from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kv_transfer.agent import make_agent


@pytest.fixture(scope="module")
def agents() -> Iterator[tuple[Any, Any]]:
    yield make_agent(["UCX"], 0, 1000), make_agent(["UCX"], 0, 1000)


def region(memory: np.ndarray[Any, Any]) -> tuple[int, int, int]:
    return (memory.ctypes.data, memory.nbytes, 0)


def test_an_agent_that_nobody_steps_serves_its_peers(agents: tuple[Any, Any]) -> None:
    reader, owner = agents
    here, there = np.zeros(1000, dtype=np.int64), np.arange(1000)
    for agent, memory in ((reader, here), (owner, there)):
        agent.register_memory(agent.get_reg_descs([(*region(memory), "")], "DRAM"))
    name = reader.add_remote_agent(owner.get_agent_metadata())
    descs = (reader.get_xfer_descs([region(memory)], "DRAM") for memory in (here, there))
    handle = reader.initialize_xfer("READ", *descs, name)
    reader.transfer(handle)
    deadline = time.monotonic() + 20
    while reader.check_xfer_state(handle) == "PROC":
        assert time.monotonic() < deadline, "the owner makes no progress by itself"
        time.sleep(0.001)
    assert (here == there).all()


def test_two_idle_agents_rest(agents: tuple[Any, Any]) -> None:
    # Spinning, each would take a core, or its share of one on a busy machine.
    begin, used = time.monotonic(), sum(os.times()[:2])
    time.sleep(1.0)
    share = (sum(os.times()[:2]) - used) / (time.monotonic() - begin)
    assert share < 0.3, f"{share:.0%} of a core"
