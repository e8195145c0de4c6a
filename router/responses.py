"""What is special about a stream of the Responses API: events with names, a preamble, and an end of its own."""

from __future__ import annotations

import re

from router.relay import StreamRelay

# An engine sends these as soon as it has taken the request, long before it has a token.
PREAMBLE = re.compile(rb"(?:event: response\.(?:created|in_progress)\r?\ndata: [^\n]*\n\r?\n)*")
COMPLETED = b"event: response.completed\n"  # JSON escapes line ends, so no token's text can hold this


class ResponsesRelay(StreamRelay):
    """Holds the preamble back until something follows it: until then another engine can still take the request."""

    _preamble = b""
    _passes = False
    _is_complete = False

    def _whole_events(self, data: bytes) -> bytes:
        events = super()._whole_events(data)
        if not self._passes:
            events = self._preamble + events
            if PREAMBLE.fullmatch(events):
                self._preamble = events
                return b""
            self._passes = True
        if COMPLETED in events:
            self._is_complete = True
        return events

    def _has_ended(self) -> bool:
        return self._is_complete and not self._partial
