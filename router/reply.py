"""The client's side of one request, over ASGI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from router.errors import error_body, error_event

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from starlette.types import Send

    from router.errors import RouterError
    from router.outlet import Outlet

    Header = tuple[bytes, bytes]


class Reply:
    """Either one whole answer, or a stream of server-sent events."""

    def __init__(
        self,
        send: Send,
        has_named_events: bool = False,
        headers: Sequence[Header] = (),
        outlet: Outlet | None = None,
    ) -> None:
        """`headers` go out with whatever is answered; through an `outlet` a stream's parts go without `send`."""
        self._send = send
        self._has_named_events = has_named_events
        self._headers = headers
        self._outlet = outlet
        self._keep: Callable[[bytes], None] | None = None
        self.status: int | None = None  # None until the client got something
        self.is_complete = False  # True when the client was sent all
        self.is_sending = False  # True while the client does not take what it is sent

    @property
    def started(self) -> bool:
        return self.status is not None

    async def whole(
        self, status: int, body: bytes, headers: list[tuple[bytes, bytes]], content_type: bytes = b"application/json"
    ) -> None:
        await self._start(
            status, [(b"content-type", content_type), (b"content-length", str(len(body)).encode()), *headers]
        )
        await self._send({"type": "http.response.body", "body": body})
        self.is_complete = True
        if self._keep is not None:
            self._keep(body)

    async def start_stream(self) -> None:
        # x-accel-buffering: nginx would otherwise collect events before it passes them on.
        await self._start(
            200,
            [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"transfer-encoding", b"chunked"),  # said, because `push` does it by itself
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
            ],
        )

    def push(self, data: bytes, chunk: bytes | None = None) -> Coroutine[Any, Any, None] | None:
        """Sends a part of the stream, at once if the client takes it; otherwise what is returned must be awaited.

        `chunk` is the same as a chunk of HTTP/1.1, if it is at hand.
        """
        outlet = self._outlet
        if outlet is None or outlet.is_shut:
            return self.chunk(data)
        outlet.write(b"%x\r\n%b\r\n" % (len(data), data) if chunk is None else chunk)
        if self._keep is not None:
            self._keep(data)
        return None

    async def chunk(self, data: bytes) -> None:
        self.is_sending = True
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        self.is_sending = False
        if self._keep is not None:
            self._keep(data)

    async def end_stream(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})
        self.is_complete = True

    async def fail(self, error: RouterError) -> None:
        """The error as the answer, or as the stream's last event if its 200 is out already."""
        if not self.started:
            await self.whole(error.status, error_body(error), error.headers)
            return
        await self.chunk(error_event(error, self._has_named_events))
        await self.end_stream()

    def tee(self, keep: Callable[[bytes], None]) -> None:
        """From now on shows `keep` every part of the answer's body once it is sent."""
        self._keep = keep

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers, *self._headers]})
