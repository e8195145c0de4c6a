"""uvicorn's HTTP protocol with an end to headers, and OpenAI's error body for what is not HTTP.

httptools collects a header for as long as the client sends it; without this, one connection could fill the memory
before the application sees anything.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import TYPE_CHECKING

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from router.errors import InvalidRequest, error_body
from router.front import headers_too_large

if TYPE_CHECKING:
    from router.errors import RouterError


def limited_protocol(max_header_bytes: int) -> type[asyncio.Protocol]:
    """A class, because uvicorn makes one instance for each connection. Hooks: HttpToolsProtocol's parser callbacks."""

    class HeaderLimitedProtocol(HttpToolsProtocol):
        num_header_bytes = 0
        in_headers = True
        has_completed = False

        def data_received(self, data: bytes) -> None:
            self.has_completed = False
            super().data_received(data)
            # Headers that are complete are counted by the application; these are not complete yet.
            if self.in_headers and not self.has_completed:
                self.num_header_bytes += len(data)
                if self.num_header_bytes > max_header_bytes and not self.transport.is_closing():
                    self._refuse(headers_too_large(max_header_bytes))

        def on_headers_complete(self) -> None:
            self.in_headers = False
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            super().on_message_complete()
            self.in_headers, self.has_completed, self.num_header_bytes = True, True, 0

        def send_400_response(self, msg: str) -> None:
            self._refuse(InvalidRequest(msg))

        def _refuse(self, error: RouterError) -> None:
            body = error_body(error)
            phrase = HTTPStatus(error.status).phrase.encode()
            self.transport.write(
                b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"
                % (error.status, phrase, len(body), body)
            )
            self.transport.close()

    return HeaderLimitedProtocol
