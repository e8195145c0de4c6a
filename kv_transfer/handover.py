"""How long hand-overs take on the decode engine, from a request's arrival to its first step, but for the copy itself.

Times are taken where they can be compared: the engine's own clock for what the scheduler sees, and of the rank, which
may be on another host, only differences.

    arrival      order to pull                    pulled        first step
       |             |  handshake, queue, | copy |   |              |
       |---- room ---|-------- pull ------|------|---|--- resume ---|

Of a streamed request the pull begins with its prefill's end; what lies between the order and that is in no stage.
"""

from __future__ import annotations

import time
from collections.abc import Container
from dataclasses import dataclass
from enum import StrEnum

from kv_transfer.metadata import TransferRecord


class Stage(StrEnum):
    """Part of a hand-over; label of `tknp_kv_handover_stage_seconds_total`."""

    ROOM = "room"  # from the front end to the scheduler, and until the request's rank has blocks for it
    PULL = "pull"  # from the order to the KV cache's being complete and known to be right, less the copy
    RESUME = "resume"  # until the request is in a step


@dataclass(frozen=True)
class HandOver:
    """One that came to its end; `seconds` by stage."""

    rank: int
    path: str
    seconds: dict[Stage, float]


@dataclass
class _UnderWay:
    arrived: float  # unix seconds, as `ordered`
    ordered: float
    record: TransferRecord | None = None


class HandOverClock:
    """A decode scheduler's hand-overs under way."""

    def __init__(self) -> None:
        self._under_way: dict[str, _UnderWay] = {}

    def order(self, request_id: str, arrived: float) -> None:
        """The request, which arrived at the engine then (unix seconds), has its blocks; its rank is told to pull."""
        self._under_way[request_id] = _UnderWay(arrived, time.time())

    def complete(self, request_id: str, record: TransferRecord) -> None:
        """The rank, or one of its tensor-parallel workers, has the request's KV cache."""
        if (one := self._under_way.get(request_id)) is not None:
            one.record = record if one.record is None else one.record.merged_with(record)

    def start(self, request_ids: Container[str]) -> list[HandOver]:
        """The hand-overs that end, since these requests are in a step."""
        now = time.time()
        started = [r for r, one in self._under_way.items() if one.record is not None and r in request_ids]
        return [_ended(self._under_way.pop(r), now) for r in started]

    def forget(self, request_id: str) -> None:
        """It came to nothing."""
        self._under_way.pop(request_id, None)

    def __len__(self) -> int:
        return len(self._under_way)


def _ended(one: _UnderWay, now: float) -> HandOver:
    assert one.record is not None
    pull, waited = one.record.transfer_end - one.record.transfer_begin, one.record.prefill_seconds
    seconds = {
        Stage.ROOM: one.ordered - one.arrived,
        Stage.PULL: pull - one.record.copy_seconds,
        Stage.RESUME: now - one.ordered - waited - pull,
    }
    # Clocks that are set back meanwhile must not end the engine.
    return HandOver(one.record.rank, one.record.path, {stage: max(0.0, s) for stage, s in seconds.items()})
