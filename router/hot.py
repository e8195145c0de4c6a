"""The application's way in: requests for tokens go straight to their route, everything else through FastAPI.

FastAPI's middleware stack wraps what a route sends in a coroutine for each of its layers, for which every token pays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from router.errors import RouterError
from router.front import enter, id_header
from router.gate import admit
from router.reply import Reply

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.types import ASGIApp, Receive, Scope, Send


class HotPaths:
    """What Front and Gate ask of a request is asked here, too; a route adds the request's id to its answer itself."""

    def __init__(self, routes: Mapping[str, ASGIApp], max_header_bytes: int, others: ASGIApp) -> None:
        """`routes` answer POST at their path."""
        self._routes = routes
        self._max_header_bytes = max_header_bytes
        self._others = others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._routes.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if route is None:
            await self._others(scope, receive, send)
            return
        try:
            enter(scope, self._max_header_bytes)
            admit(scope)
        except RouterError as error:
            await Reply(send, headers=[id_header(scope)]).fail(error)
            return
        await route(scope, receive, send)
