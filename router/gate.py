"""What every request but a probe passes: is there room for its connection, and whose API key does it show?"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from router.callers import ANONYMOUS
from router.errors import Forbidden, RouterError, TooManyConnections
from router.reply import Reply

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send

    from router.callers import Caller
    from router.state import RouterState

PROBES = frozenset({"/health", "/ready"})  # what an orchestrator asks before it kills: always answered
ADMIN_PREFIX = "/admin/"


class Gate:
    """Puts the caller into scope["state"]["caller"]. A path that is not known to be open needs a key.

    What changes the router for everybody lies below ADMIN_PREFIX and needs an admin's key; where no keys are in use, it
    has to be asked from the router's own machine.
    """

    def __init__(self, app: ASGIApp, open_paths: frozenset[str]) -> None:
        self._app = app
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._open_paths:
            try:
                admit(scope)
            except RouterError as error:
                await Reply(send).fail(error)
                return
        await self._app(scope, receive, send)


def admit(scope: Scope) -> None:
    """Puts the caller into the scope's state. Raises RouterError if the request may not pass."""
    router: RouterState = scope["app"].state.router
    state = scope["state"]
    if state.get("is_surplus"):  # see router/protocol.py
        router.access.metrics.connection_refused()
        raise TooManyConnections("The router has as many connections as it takes. Retry in 5 s.")
    caller = state["caller"] = router.access.identify(scope)
    if scope["path"].startswith(ADMIN_PREFIX):
        if not caller.is_admin:
            raise Forbidden("This path needs the API key of an admin.")
        if caller is ANONYMOUS and not _is_from_here(scope):
            raise Forbidden("Without API keys this path is for the router's own machine. Set --api-keys-file.")


def _is_from_here(scope: Scope) -> bool:
    client = scope.get("client")
    return client is not None and ipaddress.ip_address(client[0]).is_loopback


def caller_of(request: Request) -> Caller:
    """Of a request that came through the gate, and not on an open path."""
    caller: Caller = request.scope["state"]["caller"]
    return caller
