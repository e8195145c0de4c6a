"""The hot route: one POST that wants tokens.

A plain ASGI object behind HotPaths: FastAPI's own routing and streaming cost as much as everything else together.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any

from router.body import ClientGone, read_body
from router.errors import RouterError, ShuttingDown
from router.front import id_header
from router.handoff import Handoff
from router.hangup import run_until_hang_up
from router.lifetime import Moment, RequestRecord
from router.reply import Reply
from router.terms import read_terms
from router.types import Api, Outcome, Role
from router.validation import check_length, parse_request

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from router.state import RouterState
    from router.types import GenerationRequest, Task

logger = logging.getLogger(__name__)

TRACE_HEADERS = (b"traceparent", b"tracestate")  # W3C trace context: the only headers of the client's that engines see


class GenerationRoute:
    def __init__(self, api: Api | Task) -> None:
        self._api = api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state: RouterState = scope["app"].state.router
        record = RequestRecord(scope["state"]["request_id"], self._api, scope["state"]["caller"])
        reply = Reply(send, self._api is Api.RESPONSES, [id_header(scope)], scope["state"]["outlet"])
        state.records.begin(record)
        try:
            await self._answer(state, record, reply, scope, receive)
        finally:
            record.status = reply.status
            state.finish(record)

    async def _answer(
        self, state: RouterState, record: RequestRecord, reply: Reply, scope: Scope, receive: Receive
    ) -> None:
        try:
            terms = read_terms(scope)
            request = await self._accept(state, record, scope, receive)
            tape = state.guard.watch(request, reply)
            work = partial(self._serve, state, request, record, reply)
            admitted = state.admission.run(work, terms, record, reply, *self._conditions(state, request))
            if await run_until_hang_up(admitted, scope["state"]["outlet"], reply):
                record.outcome = Outcome.OK
                if tape is not None:
                    state.guard.check(request, record, tape)
            else:
                _end(record, Outcome.CANCELLED, "the client hung up")
        except ClientGone:
            _end(record, Outcome.CANCELLED, "the client hung up while it sent its body")
        except RouterError as error:
            _end(record, error.outcome, error.logged)
            if error.outcome is not Outcome.CANCELLED:
                await reply.fail(error)
        except asyncio.CancelledError:
            shutdown = ShuttingDown("The router is shutting down. Please retry the request.")
            _end(record, Outcome.FAILED, shutdown.message)
            await reply.fail(shutdown)
        except Exception as error:
            logger.exception("request %s failed for a reason that is the router's own", record.id)
            _end(record, Outcome.FAILED, repr(error))
            await reply.fail(RouterError("The router failed. The log of the router says why, under this request's id."))

    async def _accept(
        self, state: RouterState, record: RequestRecord, scope: Scope, receive: Receive
    ) -> GenerationRequest:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        limits = state.settings.max_body_bytes, state.settings.body_timeout
        raw = await read_body(headers, receive, *limits, is_here=scope["state"]["outlet"].has_body)
        trace = tuple((name.decode(), value.decode("latin-1")) for name, value in headers if name in TRACE_HEADERS)
        record.trace = state.tracing.begin(trace)
        request = self._parse(state, raw, record.id, trace)
        record.model, record.stream, record.local_prefill = request.model, request.stream, request.local_prefill
        roles = (Role.DECODE,) if request.local_prefill else tuple(Role)
        state.pool.require(request.model, roles)
        card = state.pool.models()[request.model]
        check_length(request, card)
        state.pool.chooser.describe(request, _header(headers, state.settings.session_header), card)
        return request

    def _conditions(self, state: RouterState, request: GenerationRequest) -> tuple[Callable[[], bool], ...]:
        """What admission waits for beside a slot."""
        return (partial(state.pool.has_room, request),) if state.settings.wait_for_room else ()

    def _parse(
        self, state: RouterState, raw: bytes, request_id: str, trace: tuple[tuple[str, str], ...]
    ) -> GenerationRequest:
        assert isinstance(self._api, Api)
        return parse_request(self._api, raw, request_id, trace, state.settings.model_aliases)

    def _serve(
        self, state: RouterState, request: GenerationRequest, record: RequestRecord, reply: Reply
    ) -> Coroutine[Any, Any, None]:
        return Handoff(state.fleet, request, record, reply).run()


def _header(headers: list[tuple[bytes, bytes]], name: str) -> str | None:
    wanted = name.lower().encode()
    return next((value.decode("latin-1") for found, value in headers if found == wanted), None)


def _end(record: RequestRecord, outcome: Outcome, error: str) -> None:
    record.outcome, record.error = outcome, error
    record.mark(Moment.CANCELLED if outcome is Outcome.CANCELLED else Moment.FAILED)
