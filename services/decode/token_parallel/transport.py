"""How rows travel between the root of a token-parallel group and its KV workers.

A transport only moves contiguous tensors between two ranks; who sends what is known on both sides from the
SchedulerOutput, so no header is sent. Every `send` must meet a `recv` of the same size, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch


class Transport(Protocol):
    """Point-to-point transfers inside one token-parallel group; ranks are token-parallel ranks."""

    def start(
        self, sends: Sequence[tuple[torch.Tensor, int]] = (), recvs: Sequence[tuple[torch.Tensor, int]] = ()
    ) -> Any:
        """Starts transfers and returns a handle for `wait`. The tensors must not be touched before that."""
        ...

    def wait(self, handle: Any) -> None:
        """Returns when the transfers of `handle` are complete, as seen by whatever reads the tensors next.

        Raises:
            RuntimeError: the other side is gone.
        """
        ...


class GlooTransport:
    """Transfers over a torch.distributed group of the gloo backend, for tensors in host memory."""

    def __init__(self, group: Any, ranks: Sequence[int]) -> None:
        """Args:
        group: the torch.distributed process group.
        ranks: global rank of each token-parallel rank.
        """
        self._group = group
        self._ranks = ranks

    def start(
        self, sends: Sequence[tuple[torch.Tensor, int]] = (), recvs: Sequence[tuple[torch.Tensor, int]] = ()
    ) -> list[Any]:
        works = [torch.distributed.isend(t, dst=self._ranks[r], group=self._group) for t, r in sends]
        works += [torch.distributed.irecv(t, src=self._ranks[r], group=self._group) for t, r in recvs]
        return works

    def wait(self, handle: list[Any]) -> None:
        for work in handle:
            work.wait()


class TorchNcclTransport:
    """Transfers over a torch.distributed group of the nccl backend: for where vLLM's own communicator can't be used."""

    def __init__(self, group: Any, ranks: Sequence[int]) -> None:
        """See `GlooTransport`."""
        self._group = group
        self._ranks = ranks

    def start(
        self, sends: Sequence[tuple[torch.Tensor, int]] = (), recvs: Sequence[tuple[torch.Tensor, int]] = ()
    ) -> list[Any]:
        p2p = torch.distributed
        pairs = [(p2p.isend, t, r) for t, r in sends] + [(p2p.irecv, t, r) for t, r in recvs]
        operations = [p2p.P2POp(op, tensor, self._ranks[rank], self._group) for op, tensor, rank in pairs]
        return list(p2p.batch_isend_irecv(operations)) if operations else []

    def wait(self, handle: list[Any]) -> None:
        for work in handle:
            work.wait()  # orders the current stream behind the transfer; the host goes on


class NcclTransport:
    """Transfers over vLLM's pynccl communicator, in the order of the current CUDA stream; the host never waits."""

    def __init__(self, communicator: Any) -> None:
        """Args:
        communicator: the `PyNcclCommunicator` of the token-parallel group.

        Raises:
            RuntimeError: vLLM disabled it, which it does silently where it finds a NCCL that it can't use.
        """
        if communicator is None or communicator.disabled:
            raise RuntimeError(
                "vLLM's NCCL communicator is disabled, so token-parallel ranks cannot exchange rows; "
                "install the NCCL that this vLLM was built for (nvidia-nccl)"
            )
        self._communicator = communicator

    def start(
        self, sends: Sequence[tuple[torch.Tensor, int]] = (), recvs: Sequence[tuple[torch.Tensor, int]] = ()
    ) -> None:
        stream = torch.cuda.current_stream()
        self._communicator.group_start()
        for tensor, rank in sends:
            self._communicator.send(tensor, rank, stream)
        for tensor, rank in recvs:
            self._communicator.recv(tensor, rank, stream)
        self._communicator.group_end()

    def wait(self, handle: None) -> None:
        """Nothing to do: what reads the tensors next is ordered behind the transfer on the same stream."""
