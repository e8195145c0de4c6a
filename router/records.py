"""The requests in flight, and the last ones that ended, in bounded memory."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from router.lifetime import RequestRecord

MAX_ID_LENGTH = 128


class RecordStore:
    def __init__(self, num_kept: int) -> None:
        self._num_kept = num_kept
        self._in_flight: dict[str, RequestRecord] = {}
        self._finished: OrderedDict[str, RequestRecord] = OrderedDict()

    def pick_id(self, wanted: str | None) -> str:
        """The client's id if it is short, printable and not in use right now, otherwise a new one.

        Two requests of one id in flight would mix up their KV transfers.
        """
        is_valid = wanted and len(wanted) <= MAX_ID_LENGTH and all("!" <= char <= "~" for char in wanted)
        if wanted and is_valid and wanted not in self._in_flight:
            return wanted
        return f"req-{secrets.token_hex(16)}"

    def begin(self, record: RequestRecord) -> None:
        self._in_flight[record.id] = record

    def finish(self, record: RequestRecord) -> None:
        self._in_flight.pop(record.id, None)
        self._finished.pop(record.id, None)
        self._finished[record.id] = record
        while len(self._finished) > self._num_kept:
            self._finished.popitem(last=False)

    def get(self, request_id: str) -> RequestRecord | None:
        return self._in_flight.get(request_id) or self._finished.get(request_id)

    def recent(self, num: int) -> list[RequestRecord]:
        """The last requests that ended, the newest first."""
        return list(islice(reversed(self._finished.values()), num))

    def in_flight(self) -> list[RequestRecord]:
        """A copy, safe to walk from another thread."""
        return list(self._in_flight.values())
