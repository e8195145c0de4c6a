"""The client's side of one request, over ASGI."""

from __future__ import annotations

from collections.abc import Coroutine
from functools import partial
from types import coroutine
from typing import TYPE_CHECKING, Any

from router.errors import error_body, error_event

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from starlette.types import Message, Send

    from router.errors import RouterError

    Header = tuple[bytes, bytes]


class Reply:
    """Either one whole answer, or a stream of server-sent events."""

    def __init__(self, send: Send, has_named_events: bool = False, headers: Sequence[Header] = ()) -> None:
        self._send = send
        self._has_named_events = has_named_events
        self._headers = headers  # of whatever is answered
        self.status: int | None = None  # None until the client got something
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

    async def start_stream(self) -> None:
        # x-accel-buffering: nginx would otherwise collect events before it passes them on.
        await self._start(
            200,
            [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
            ],
        )

    async def chunk(self, data: bytes) -> None:
        if (rest := self.push(data)) is not None:
            await rest

    def push(self, data: bytes) -> Coroutine[Any, Any, None] | None:
        """Sends a part of the stream without a turn of the event loop. What is returned must be awaited before the next
        part: the client takes no more for the moment."""
        # Servers write at once unless the client is slow, so the coroutine mostly ends with its first step.
        sending = self._send({"type": "http.response.body", "body": data, "more_body": True})
        assert isinstance(sending, Coroutine)
        try:
            waits_for = sending.send(None)
        except StopIteration:
            return None
        self.is_sending = True
        return self._finish(sending, waits_for)

    async def _finish(self, sending: Coroutine[Any, Any, None], waits_for: Any) -> None:
        await _resumed(sending, waits_for)
        self.is_sending = False

    async def end_stream(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})

    async def fail(self, error: RouterError) -> None:
        """The error as the answer, or as the stream's last event if its 200 is out already."""
        if not self.started:
            await self.whole(error.status, error_body(error), error.headers)
            return
        await self.chunk(error_event(error, self._has_named_events))
        await self.end_stream()

    def tee(self, keep: Callable[[bytes], None]) -> None:
        """From now on shows `keep` every part of the answer's body as it is sent."""
        send = self._send

        async def send_and_keep(message: Message) -> None:
            if body := message.get("body"):
                keep(body)
            await send(message)

        self._send = send_and_keep

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers, *self._headers]})


@coroutine
def _resumed(begun: Coroutine[Any, Any, None], waits_for: Any) -> Generator[Any, Any, None]:
    """The rest of a coroutine whose first step, taken by hand, gave a future to wait for."""
    while True:
        try:
            result = yield waits_for
        except BaseException as error:  # noqa: BLE001 a cancellation, which goes where it was meant to
            step = partial(begun.throw, error)
        else:
            step = partial(begun.send, result)
        try:
            waits_for = step()
        except StopIteration:
            return
