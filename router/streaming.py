"""Both legs of a hand-off at once: the decode engine reserves blocks when the prefill engine begins, and pulls each
part of the KV cache as soon as it is computed (kv_transfer.streaming_worker). The first token is the decode engine's,
as ever.

    prefill leg fails   the decode leg is cancelled, unless the client has tokens of it: then it had all it needs
    decode leg ends     the prefill leg is cancelled, if it does not end soon
    decode leg fails    the prefill leg is cancelled, unless the decode engine was never reached: then the KV cache goes
                        to another one, in the ordinary way
"""

from __future__ import annotations

import asyncio
import traceback
from typing import TYPE_CHECKING

from router.cached_usage import PATIENCE
from router.errors import EngineFailure

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from router.types import JsonObject

_FIELDS = {
    "remote_engine_id": "engine_id",
    "remote_host": "host",
    "remote_port": "port",
    "tp_size": "tp_size",
    "dcp_size": "dcp_size",
    "pp_size": "pp_size",
}


def stream_params(peer: JsonObject | None, lease_id: str) -> JsonObject | None:
    """The `kv_transfer_params` of a decode leg whose KV cache is still computed; None if the engines can't do that.

    Args:
        peer: see Introductions.peer.
    """
    if peer is None or not peer.get("streams") or not peer.keys() >= set(_FIELDS.values()):
        return None
    where = {name: peer[field] for name, field in _FIELDS.items()}
    return {"do_remote_prefill": True, "do_remote_decode": False, **where, "tknp_stream": lease_id}


async def run_both(
    prefill: Coroutine[None, None, None], decode: Coroutine[None, None, None], is_answering: Callable[[], bool]
) -> None:
    """Runs the two legs to their ends; see the module. Nothing of either is left running, however this ends.

    Args:
        is_answering: whether the client has got something of the decode leg.

    Raises:
        RouterError: what the leg raised that the other was cancelled for.
    """
    legs = prefilling, decoding = asyncio.create_task(prefill), asyncio.create_task(decode)
    failure = None
    try:
        await asyncio.wait(legs, return_when=asyncio.FIRST_COMPLETED)
        if _failure(prefilling) is _failure(decoding) is None:
            # A whole answer needs no prefill leg any more: that has little left to say, or its engine is gone.
            await asyncio.wait(legs, timeout=PATIENCE if decoding.done() else None, return_when=asyncio.FIRST_EXCEPTION)
        if _failure(prefilling) is not None and is_answering():
            await decoding
            return
        failure = _failure(decoding)
        if isinstance(failure, EngineFailure) and not failure.reached_engine:
            await prefilling
        if failure := _failure(prefilling) or failure:
            raise failure
    finally:
        for leg in legs:
            leg.cancel()
        try:
            await asyncio.gather(*legs, return_exceptions=True)  # which waits for them even if it is cancelled itself
        finally:
            for leg in legs:
                _forget_frames(leg)
            del legs, leg, prefilling, decoding, failure  # the traceback of what is raised has this frame, too


def _failure(leg: asyncio.Task[None]) -> BaseException | None:
    """What it ended with, if it has, and not because it was told to."""
    try:
        return leg.exception() if leg.done() else None
    except asyncio.CancelledError:
        return None


def _forget_frames(leg: asyncio.Task[None]) -> None:
    """Of one that ended. It keeps what it failed with, which keeps the frames on its way, which keep timers of the leg:
    a cycle, in which every such request would stay for minutes."""
    error = _failure(leg)
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
