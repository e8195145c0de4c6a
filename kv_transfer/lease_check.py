"""The reading side of kv_transfer.identity: when KV cache has arrived, a small read of whether it was held so long."""

from __future__ import annotations

import sys
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.logger import init_logger

from kv_transfer.identity import ROW_BYTES, Offer

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = init_logger(f"vllm.{__name__}")

MAX_CHECKS = 1024
"""Checks under way at a time; more wait for the next poll."""


class Verdict(Enum):
    HELD = "held"
    PENDING = "pending"
    LEASE_ENDED = "lease_ended"
    OTHER_ENGINE = "other_engine"
    FAILED = "failed"  # the check itself


class Stale(Enum):
    """Why KV cache that arrived, or was offered, is not used; label of `tknp_kv_transfer_stale_total`."""

    LEASE_ENDED = Verdict.LEASE_ENDED.value
    OTHER_ENGINE = Verdict.OTHER_ENGINE.value
    TOO_LATE = "too_late"  # of a stock prefill engine, longer after the offer than its lease is sure to last
    OTHER_PROMPT = "other_prompt"
    CHECKSUM = "checksum"
    STREAM_BROKEN = "stream_broken"  # before its prefill's end


class QuietReads:
    """NIXL's agent, whose reads can be made without their notification, which would end the lease before its check, and
    of some of the regions that vLLM registered only."""

    def __init__(self, agent: Any) -> None:
        self._agent = agent
        self._quiet = False
        self._regions: tuple[int, int, int] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._agent, name)

    @contextmanager
    def quiet(self, regions: tuple[int, int, int] | None = None) -> Iterator[None]:
        """`regions`: the first to read, the one after the last, and how many there are; None reads all."""
        self._quiet, self._regions = True, regions
        try:
            yield
        finally:
            self._quiet, self._regions = False, None

    def make_prepped_xfer(
        self, operation: str, local: Any, local_ids: Any, remote: Any, remote_ids: Any, notif_msg: bytes = b"", **k: Any
    ) -> Any:
        if self._regions is not None:
            # vLLM lists the pages of one region after those of another (_compute_desc_ids).
            first, end, count = self._regions
            num_pages = len(local_ids) // count
            chosen = slice(first * num_pages, end * num_pages)
            local_ids, remote_ids = local_ids[chosen], remote_ids[chosen]
        message = b"" if self._quiet else notif_msg
        return self._agent.make_prepped_xfer(operation, local, local_ids, remote, remote_ids, notif_msg=message, **k)


@dataclass
class _Check:
    """Of one request: the workers that it read from, and the reads of their tables."""

    offer: Offer
    workers: dict[tuple[int, int], str] = field(default_factory=dict)  # (pipeline, tensor-parallel) rank -> agent
    reads: dict[tuple[int, int], tuple[Any, int]] = field(default_factory=dict)  # -> handle, row here


class LeaseChecks:
    """A rank's checks."""

    def __init__(self, agent: Any, needs_checksums: bool = False) -> None:
        """Args:
        agent: NIXL's.
        needs_checksums: waits until the prefill worker has written them, if it does that at all.
        """
        self._agent = agent
        self._needs_checksums = needs_checksums
        self._rows = np.zeros((MAX_CHECKS, 3), dtype=np.uint64)
        self._free_rows = deque(range(MAX_CHECKS))
        self._checks: dict[str, _Check] = {}

    @property
    def region(self) -> tuple[int, int, int, str]:
        """Address, bytes, device and name, as NIXL registers memory."""
        return (self._rows.ctypes.data, self._rows.nbytes, 0, "")

    def expect(self, request_id: str, offer: Offer, worker: tuple[int, int], agent_name: str) -> None:
        """A read of this request's KV cache from `worker` was posted."""
        self._checks.setdefault(request_id, _Check(offer)).workers[worker] = agent_name

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._checks

    def __len__(self) -> int:
        return len(self._checks)

    def poll(self, request_id: str, patience: float = 0.0) -> Verdict:
        """To be called once all of the request's reads are done, until it is no more pending; the check is then
        forgotten.

        Args:
            patience: seconds for which an answer is waited for.
        """
        deadline = time.perf_counter() + patience
        while (verdict := self._poll(request_id)) is Verdict.PENDING and time.perf_counter() < deadline:
            time.sleep(0)  # lets others have the interpreter
        return verdict

    def _poll(self, request_id: str) -> Verdict:
        check = self._checks[request_id]
        try:
            for worker, agent_name in check.workers.items():
                if worker not in check.reads and self._free_rows:
                    check.reads[worker] = self._post(check.offer, worker, agent_name)
            states = [self._agent.check_xfer_state(handle) for handle, _ in check.reads.values()]
        except Exception as error:  # noqa: BLE001 - NIXL's have no common class; all mean that the peer is gone
            logger.warning("request %s: whether its KV cache was held could not be read: %r", request_id, error)
            self.drop(request_id)
            return Verdict.FAILED
        if "ERR" in states:
            self.drop(request_id)
            return Verdict.FAILED
        if len(states) < len(check.workers) or "PROC" in states:
            return Verdict.PENDING
        verdict = self._verdict(check)
        if verdict is Verdict.PENDING:  # to be read again
            self._release(check)
        else:
            self.drop(request_id)
        return verdict

    def _post(self, offer: Offer, worker: tuple[int, int], agent_name: str) -> tuple[Any, int]:
        address, _ = offer.row_of(worker)
        row = self._free_rows[0]
        here = self._rows.ctypes.data + row * ROW_BYTES
        handle = self._agent.initialize_xfer(
            "READ",
            self._agent.get_xfer_descs([(here, ROW_BYTES, 0)], "DRAM"),
            self._agent.get_xfer_descs([(address, ROW_BYTES, 0)], "DRAM"),
            agent_name,
        )
        self._agent.transfer(handle)
        return handle, self._free_rows.popleft()

    def _verdict(self, check: _Check) -> Verdict:
        for worker, (_, row) in check.reads.items():
            found = self._rows[row].tobytes()
            _, expected = check.offer.row_of(worker)
            if found[:8] != expected[:8]:
                return Verdict.OTHER_ENGINE
            if found[:16] != expected:
                return Verdict.LEASE_ENDED
            if self._needs_checksums and check.offer.tables[worker].checksums:
                ready = int.from_bytes(found[16:], sys.byteorder)
                if ready != check.offer.generation + 1:
                    return Verdict.PENDING
        return Verdict.HELD

    def drop(self, request_id: str) -> None:
        """Forgets the request, if there is one of this name."""
        if check := self._checks.pop(request_id, None):
            self._release(check)

    def _release(self, check: _Check) -> None:
        reads, check.reads = check.reads, {}
        for handle, row in reads.values():
            try:
                self._agent.release_xfer_handle(handle)
            except Exception:  # noqa: BLE001 - it may still be written to: this row is not used again
                continue
            self._free_rows.append(row)

    def shutdown(self) -> None:
        for request_id in list(self._checks):
            self.drop(request_id)
