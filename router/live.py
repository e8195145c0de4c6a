"""The live page at `/`, for people without Grafana: one file without anything from elsewhere, fed by `GET /status`."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources
from typing import TYPE_CHECKING

from fastapi import Request, Response

from router.errors import Forbidden
from router.gate import caller_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from router.state import RouterState


def live_page() -> Callable[[], Awaitable[Response]]:
    """A route that answers with the page, which is read once."""
    page = resources.files("router").joinpath("live.html").read_bytes()
    headers = {
        "Content-Security-Policy": content_policy(page),
        "Cache-Control": "no-cache",
        "X-Content-Type-Options": "nosniff",
    }

    async def show() -> Response:
        return Response(page, media_type="text/html", headers=headers)

    return show


def content_policy(page: bytes) -> str:
    """Lets the browser run the page's own script and style, and nothing that a name from outside smuggles in."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash_of(page, b'script')}",
            f"style-src {_hash_of(page, b'style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def _hash_of(page: bytes, tag: bytes) -> str:
    (content,) = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"


async def status(request: Request) -> Response:
    """The router's state as JSON, at most a second old. The engines are asked only while somebody reads this."""
    if not caller_of(request).is_admin:  # it names engines, and other callers' requests
        raise Forbidden("The state of the router needs the API key of an admin.")
    state: RouterState = request.app.state.router
    return Response(await state.board.read(), media_type="application/json", headers={"Cache-Control": "no-store"})
