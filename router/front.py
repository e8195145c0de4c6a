"""What every request passes first: its id, and the limit on its headers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from router.errors import HeadersTooLarge
from router.reply import Reply

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from router.state import RouterState


class Front:
    """Lets a request enter, and puts its id into the answer's X-Request-Id."""

    def __init__(self, app: ASGIApp, max_header_bytes: int) -> None:
        self._app = app
        self._max_header_bytes = max_header_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), id_header(scope)]}
            await send(message)

        try:
            enter(scope, self._max_header_bytes)
        except HeadersTooLarge as error:
            await Reply(send_with_id).fail(error)
            return
        await self._app(scope, receive, send_with_id)


def enter(scope: Scope, max_header_bytes: int) -> None:
    """Puts the request's id into scope["state"]["request_id"]. Raises HeadersTooLarge after that."""
    state: RouterState = scope["app"].state.router
    wanted = None
    num_bytes = len(scope["raw_path"]) + len(scope["query_string"])
    for name, value in scope["headers"]:
        num_bytes += len(name) + len(value) + 4
        if name == b"x-request-id":
            wanted = value.decode("latin-1")
    scope.setdefault("state", {})["request_id"] = state.records.pick_id(wanted)
    if num_bytes > max_header_bytes:
        raise headers_too_large(max_header_bytes)


def id_header(scope: Scope) -> tuple[bytes, bytes]:
    """X-Request-Id, for the answer to a request that has entered."""
    return b"x-request-id", scope["state"]["request_id"].encode()


def headers_too_large(max_bytes: int) -> HeadersTooLarge:
    return HeadersTooLarge(f"The request's headers have more than {max_bytes} bytes. Send fewer or shorter ones.")
