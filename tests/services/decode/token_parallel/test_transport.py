from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from services.decode.token_parallel.transport import GlooTransport, NcclTransport

_SECONDS = 60.0


def _exchange(transport: GlooTransport, rank: int) -> None:
    other = 1 - rank
    for layer in range(3):
        sent = torch.full((4, 8), float(10 * rank + layer))
        received = torch.empty(4, 8)
        sending = transport.start(sends=[(sent, other)])
        transport.wait(transport.start(recvs=[(received, other)]))
        transport.wait(sending)
        assert (received == 10 * other + layer).all()


def _die_early(transport: GlooTransport, rank: int) -> None:
    if rank == 1:
        # Not before the other has connected, too: the processes are not equally soon.
        transport.wait(transport.start(recvs=[(torch.empty(4), 0)]))
        os._exit(0)
    transport.wait(transport.start(sends=[(torch.zeros(4), 1)]))
    with pytest.raises(RuntimeError):
        transport.wait(transport.start(recvs=[(torch.empty(4), 1)]))


def _peer(rank: int, store: str, job: Callable[[GlooTransport, int], None]) -> None:
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=_SECONDS))
    job(GlooTransport(dist.group.WORLD, [0, 1]), rank)


@pytest.mark.parametrize("job", [_exchange, _die_early])
def test_two_processes(tmp_path: Path, job: Callable[[GlooTransport, int], None]) -> None:
    context = multiprocessing.get_context("spawn")
    store = str(tmp_path / "store")
    peers = [context.Process(target=_peer, args=(rank, store, job)) for rank in range(2)]
    for peer in peers:
        peer.start()
    for peer in peers:
        peer.join(2 * _SECONDS)
    assert [peer.exitcode for peer in peers] == [0, 0]


def test_ranks_of_the_group_are_translated_to_those_of_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(dist, "isend", lambda tensor, dst, group: seen.append(("to", dst, group)))
    monkeypatch.setattr(dist, "irecv", lambda tensor, src, group: seen.append(("from", src, group)))
    tensor = torch.zeros(1)
    GlooTransport("group", [1, 3, 5]).start(sends=[(tensor, 2)], recvs=[(tensor, 1)])
    assert seen == [("to", 5, "group"), ("from", 3, "group")]


@pytest.mark.parametrize("communicator", [None, SimpleNamespace(disabled=True)])
def test_a_disabled_nccl_is_refused_at_start(communicator: Any) -> None:
    with pytest.raises(RuntimeError, match="NCCL communicator is disabled"):
        NcclTransport(communicator)
