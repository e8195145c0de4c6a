"""Who may come in: API keys from a file that is read again when it changes, and the room for connections."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from router.callers import ANONYMOUS
from router.errors import InvalidKey
from router.keys import KeyFileError, KeyRing, read_keys
from router.watch import WatchedFile

if TYPE_CHECKING:
    from pathlib import Path

    from starlette.types import Scope

    from router.admission_metrics import AdmissionMetrics
    from router.callers import Caller

logger = logging.getLogger(__name__)

WATCH_INTERVAL = 1.0  # s until a change of the key file is noticed


class Access:
    """Without a key file everybody may come in, as the same caller."""

    def __init__(self, metrics: AdmissionMetrics) -> None:
        self.metrics = metrics
        self._keys: KeyRing | None = None

    def identify(self, scope: Scope) -> Caller:
        """Raises InvalidKey."""
        if self._keys is None:
            return ANONYMOUS
        authorization = None
        for name, value in scope["headers"]:
            if name == b"authorization":
                authorization = value
                break
        # Browsers send Basic credentials along with whatever any page makes them send, so it must change nothing.
        try:
            return self._keys.find(authorization, takes_basic=scope["method"] == "GET")
        except InvalidKey as error:
            self.metrics.unauthorized(is_missing=error.is_missing)
            raise

    def is_known(self, scope: Scope) -> bool:
        """For an open path that tells more to those with a key."""
        if self._keys is not None and not any(name == b"authorization" for name, _ in scope["headers"]):
            return False  # a probe: no attempt to get in that would have to be counted
        try:
            self.identify(scope)
        except InvalidKey:
            return False
        return True

    @contextlib.asynccontextmanager
    async def keys_from(self, path: Path | None) -> AsyncIterator[None]:
        """Keeps the keys as the file has them. Raises KeyFileError if it is bad to begin with."""
        if path is None:
            yield
            return
        file = WatchedFile(path)
        self._keys = KeyRing(read_keys(path))
        watching = asyncio.create_task(file.watch(WATCH_INTERVAL, lambda: self._read_again(path)))
        try:
            yield
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching

    async def _read_again(self, path: Path) -> None:
        try:
            callers = await asyncio.to_thread(read_keys, path)
        except KeyFileError as error:
            logger.error("%s; the keys from before stay in use", error)
            return
        self._keys = KeyRing(callers)
        logger.info("the key file %s changed and holds %d keys now", path, len(callers))
