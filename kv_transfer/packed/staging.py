"""The buffer that packed blocks cross the network from and to, with an agent of NIXL's for it alone: vLLM's own is not
for two threads."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Any

import torch

from kv_transfer.agent import make_agent
from kv_transfer.direct.pages import UnreachableError
from kv_transfer.packed import NUM_SLOTS
from kv_transfer.packed.wire import Slot

_REST_MICROSECONDS = 1000
"""How long the agent's progress thread waits for an event before it looks again."""
_PAGE = 4096
_PROBE_SECONDS = 5.0


@dataclass(frozen=True)
class Piece:
    """Some bytes of a staging buffer, as NIXL describes memory."""

    address: int
    num_bytes: int
    device_id: int
    memory: str

    def part(self, begin: int, num_bytes: int) -> Piece:
        return Piece(self.address + begin, num_bytes, self.device_id, self.memory)


class Staging:
    """`NUM_SLOTS` slots, and a page of random bytes behind them.

    Attributes:
        agent: to be used by one thread only.
        whole: the buffer.
    """

    def __init__(self, device: Any, num_bytes: int, backends: list[str]) -> None:
        """Args:
        num_bytes: of all slots together.

        Raises:
            RuntimeError, NIXL's errors: no memory, or NIXL can't use it.
        """
        if torch.device(device).type == "cuda":
            torch.cuda.set_device(device)  # UCX looks for this thread's CUDA context
        self.slot_bytes = num_bytes // NUM_SLOTS // _PAGE * _PAGE
        self._data = torch.empty(NUM_SLOTS * self.slot_bytes + _PAGE, dtype=torch.uint8, device=device)
        self.slots = [Slot(i, self._data[i * self.slot_bytes :][: self.slot_bytes]) for i in range(NUM_SLOTS)]
        memory, device_id = ("VRAM", self._data.get_device()) if self._data.is_cuda else ("DRAM", 0)
        self.whole = Piece(self._data.data_ptr(), self._data.numel(), device_id, memory)
        self.probe = secrets.token_bytes(_PAGE)
        self._data[-_PAGE:] = torch.frombuffer(bytearray(self.probe), dtype=torch.uint8)
        if self._data.is_cuda:
            torch.cuda.synchronize(device)
        self.agent = make_agent(backends, 0, _REST_MICROSECONDS)
        rows = [(self.whole.address, self.whole.num_bytes, device_id, "")]
        self._registered = self.agent.get_reg_descs(rows, memory)
        self.agent.register_memory(self._registered, backends=backends)

    def slot_piece(self, slot: Slot, num_bytes: int) -> Piece:
        return self.whole.part(slot.index * self.slot_bytes, num_bytes)

    def read(self, agent_name: str, source: Piece, destination: Piece) -> Any:
        """Starts one read of another's buffer; NIXL's handle."""
        ours, theirs = (
            self.agent.get_xfer_descs([(piece.address, piece.num_bytes, piece.device_id)], piece.memory)
            for piece in (destination, source)
        )
        handle = self.agent.initialize_xfer("READ", ours, theirs, agent_name)
        self.agent.transfer(handle)
        return handle

    def check_probe(self, agent_name: str, whole: Piece, probe: bytes) -> None:
        """Reads the random bytes behind another's slots, which also makes NIXL connect.

        Raises:
            UnreachableError: others came, or none.
        """
        end = self.whole.num_bytes - _PAGE
        handle = self.read(agent_name, whole.part(whole.num_bytes - _PAGE, _PAGE), self.whole.part(end, _PAGE))
        deadline = time.monotonic() + _PROBE_SECONDS
        while (state := self.agent.check_xfer_state(handle)) == "PROC" and time.monotonic() < deadline:
            time.sleep(0.0005)
        self.agent.release_xfer_handle(handle)
        if state != "DONE":
            raise UnreachableError(f"its staging buffer could not be read within {_PROBE_SECONDS:.0f} s ({state})")
        found, self._data[-_PAGE:] = bytes(self._data[-_PAGE:].cpu().numpy()), 0
        if found != probe:
            raise UnreachableError("a read of its probe brought other bytes")

    def close(self) -> None:
        self.agent.deregister_memory(self._registered)
