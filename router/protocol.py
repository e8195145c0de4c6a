"""uvicorn's HTTP protocol with an end to headers and to connections, and OpenAI's error body for what is not HTTP.

httptools collects a header for as long as the client sends it; without this, one connection could fill the memory
before the application sees anything, and any number of them could wait for ever.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from router.errors import HeaderTimeout, InvalidRequest, TooManyConnections, error_body
from router.front import headers_too_large
from router.outlet import Outlet

if TYPE_CHECKING:
    from router.errors import RouterError
    from router.settings import RouterSettings

NUM_SPARE = (
    100  # connections above the limit that are still listened to: a probe must get through, or the router is killed
)


def limited_protocol(settings: RouterSettings) -> type[asyncio.Protocol]:
    """A class, because uvicorn makes one instance for each connection. Hooks: HttpToolsProtocol's parser callbacks.

    Requests of a connection above `max_connections` have a true "is_surplus" in their scope's state (see Gate), all of
    them have an "outlet".
    """
    max_header_bytes = settings.max_header_bytes
    max_connections = settings.max_connections
    header_timeout = settings.header_timeout

    class LimitedProtocol(HttpToolsProtocol):
        outlet: Outlet
        num_header_bytes = 0
        in_headers = True
        has_completed = False
        headers_due: asyncio.TimerHandle | None = None  # set while a request's headers are awaited

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.outlet = Outlet(transport)
            num_connections = len(self.connections)
            if num_connections > max_connections + NUM_SPARE:
                self._refuse(TooManyConnections(f"The router has {num_connections} connections."))
                return
            self.app_state = {
                **self.app_state,
                "is_surplus": num_connections > max_connections,
                "outlet": self.outlet,
            }
            self._await_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._headers_came()
            super().connection_lost(exc)
            self.outlet.lose()

        def pause_writing(self) -> None:
            self.outlet.is_shut = True
            super().pause_writing()

        def resume_writing(self) -> None:
            self.outlet.is_shut = False
            super().resume_writing()

        def data_received(self, data: bytes) -> None:
            self.has_completed = False
            super().data_received(data)
            # Headers that are complete are counted by the application; these are not complete yet.
            if self.in_headers and not self.has_completed and not self.transport.is_closing():
                self.num_header_bytes += len(data)
                if self.num_header_bytes > max_header_bytes:
                    self._refuse(headers_too_large(max_header_bytes))
                elif self.headers_due is None:
                    self._await_headers()

        def on_headers_complete(self) -> None:
            self.in_headers = self.outlet.has_body = False
            self._headers_came()
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            super().on_message_complete()
            self.in_headers, self.has_completed, self.num_header_bytes = True, True, 0
            self.outlet.has_body = True

        def send_400_response(self, msg: str) -> None:
            self._refuse(InvalidRequest(msg))

        def _await_headers(self) -> None:
            self.headers_due = self.loop.call_later(header_timeout, self._give_up)

        def _headers_came(self) -> None:
            if self.headers_due is not None:
                self.headers_due.cancel()
                self.headers_due = None

        def _give_up(self) -> None:
            self.headers_due = None
            if self.num_header_bytes:
                self._refuse(HeaderTimeout(f"The request's headers did not arrive within {header_timeout:g} s."))
            else:
                self.transport.close()

        def _refuse(self, error: RouterError) -> None:
            body = error_body(error)
            phrase = HTTPStatus(error.status).phrase.encode()
            headers: list[Any] = [(b"content-type", b"application/json"), *error.headers]
            if not error.closes_connection:
                headers.append((b"connection", b"close"))
            lines = b"".join(b"%b: %b\r\n" % header for header in headers)
            self.transport.write(
                b"HTTP/1.1 %d %b\r\n%bcontent-length: %d\r\n\r\n%b" % (error.status, phrase, lines, len(body), body)
            )
            self.transport.close()

    return LimitedProtocol
