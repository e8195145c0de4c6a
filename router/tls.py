"""The certificate that the router shows to clients, read again when its files change."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from router.watch import WatchedFile

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

WATCH_INTERVAL = 5.0  # s; certificates are renewed days before they end


def make_context(certfile: Path, keyfile: Path | None, client_ca: Path | None) -> ssl.SSLContext:
    """TLS 1.2 or later. With `client_ca` only clients with a certificate of it are let in. Raises ValueError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certfile, keyfile, password=_no_password)
    except (OSError, ValueError) as error:
        key = keyfile or certfile
        raise ValueError(f"the certificate {certfile} and the key {key} can't be used: {_reason(error)}") from error
    if client_ca is not None:
        try:
            context.load_verify_locations(client_ca)
        except OSError as error:
            raise ValueError(f"the certificates in {client_ca} can't be used: {_reason(error)}") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


class Certificate:
    """`context` is the one that the server uses all its life; new connections get what was loaded last."""

    def __init__(self, certfile: Path, keyfile: Path | None, client_ca: Path | None) -> None:
        self._files = (certfile, keyfile)
        self._watched = [WatchedFile(path) for path in self._files if path is not None]
        self.context = make_context(certfile, keyfile, client_ca)

    @contextlib.asynccontextmanager
    async def kept_fresh(self, interval: float = WATCH_INTERVAL) -> AsyncIterator[None]:
        watching = [asyncio.create_task(file.watch(interval, self._load)) for file in self._watched]
        try:
            yield
        finally:
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)

    async def _load(self) -> None:
        certfile, keyfile = self._files
        try:
            # A certificate that does not fit its key would spoil the context in use, so another tries it first.
            await asyncio.to_thread(make_context, certfile, keyfile, None)
            self.context.load_cert_chain(certfile, keyfile, password=_no_password)
        except (OSError, ValueError) as error:
            logger.error("%s; the certificate from before stays in use", error)
            return
        logger.info("the certificate %s changed and is in use for new connections", certfile)


def _no_password() -> str:
    """OpenSSL would otherwise ask for one on the terminal."""
    raise ValueError("the key is encrypted; give one that is not")


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, ssl.SSLError):
        return error.reason.lower().replace("_", " ") if error.reason else "it is not in PEM format"
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else str(error)
