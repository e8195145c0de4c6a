"""What every request passes first: its id, and the limit on its headers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from router.errors import HeadersTooLarge
from router.reply import Reply

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from router.state import RouterState


class Front:
    """Puts the request's id into scope["state"]["request_id"] and into the answer's X-Request-Id."""

    def __init__(self, app: ASGIApp, max_header_bytes: int) -> None:
        self._app = app
        self._max_header_bytes = max_header_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state: RouterState = scope["app"].state.router
        wanted = None
        num_bytes = len(scope["raw_path"]) + len(scope["query_string"])
        for name, value in scope["headers"]:
            num_bytes += len(name) + len(value) + 4
            if name == b"x-request-id":
                wanted = value.decode("latin-1")
        request_id = state.records.pick_id(wanted)
        header = (b"x-request-id", request_id.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        if num_bytes > self._max_header_bytes:
            await Reply(send_with_id).fail(headers_too_large(self._max_header_bytes))
            return
        scope.setdefault("state", {})["request_id"] = request_id
        await self._app(scope, receive, send_with_id)


def headers_too_large(max_bytes: int) -> HeadersTooLarge:
    return HeadersTooLarge(f"The request's headers have more than {max_bytes} bytes. Send fewer or shorter ones.")
