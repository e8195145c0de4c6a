"""Where engines come from: the settings, a file, or Kubernetes. Each tells all engines there should be, each time that
changes; router/membership.py does the rest."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge

from router.engine_file import read_engines
from router.types import Endpoint, Role
from router.watch import WatchedFile

if TYPE_CHECKING:
    from pathlib import Path

    from router.pod_watch import Fault, PodWatch
    from router.settings import RouterSettings

logger = logging.getLogger(__name__)

FILE_INTERVAL = 1.0  # s until a change of the engine file is noticed
STOP_SECONDS = 2.0  # that a thread gets to leave the call it is in; one that is just connecting dies with the process

Found = Callable[[Collection[Endpoint]], None]


class Discovery(Protocol):
    async def run(self, found: Found) -> None:
        """Calls `found`, on the event loop, with all engines there should be, at once and whenever they change."""


class StaticDiscovery:
    """The engines of --prefill-urls and --decode-urls, which are in the pool from the start."""

    async def run(self, found: Found) -> None:
        pass


class FileDiscovery:
    """A file of engines, read again when it changes. One that can't be read changes nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def run(self, found: Found) -> None:
        file = WatchedFile(self._path)

        async def read() -> None:
            try:
                engines = await asyncio.to_thread(read_engines, self._path)
            except ValueError as error:
                logger.error("%s; engines stay as they are", error)
                return
            found(engines)

        await read()
        await file.watch(FILE_INTERVAL, read)


class KubernetesDiscovery:
    """The pods that two label selectors match, one for each role."""

    def __init__(self, settings: RouterSettings, registry: CollectorRegistry) -> None:
        from router.cluster import own_namespace
        from router.pod_watch import Fault

        self._settings = settings
        self._namespace = settings.kubernetes_namespace or own_namespace()
        self._urls: dict[Role, frozenset[str]] = {}
        self._engines: frozenset[Endpoint] = frozenset()
        faults = Counter(
            "tknp_discovery_faults",
            "Times that the pods had to be listed again, by why.",
            ["fault"],
            registry=registry,
        )
        self._faults = {fault: faults.labels(fault) for fault in Fault}
        pods = Gauge(
            "tknp_discovery_ready_pods", "Ready pods that the role's selector matches.", ["role"], registry=registry
        )
        self._pods = {role: pods.labels(role) for role in Role}

    async def run(self, found: Found) -> None:
        selectors = {
            Role.PREFILL: self._settings.kubernetes_selector_prefill,
            Role.DECODE: self._settings.kubernetes_selector_decode,
        }
        loop = asyncio.get_running_loop()
        watches = {role: self._watch(loop, role, selector, found) for role, selector in selectors.items() if selector}
        self._urls = dict.fromkeys(Role.__members__.values() - watches.keys(), frozenset())
        threads = [
            threading.Thread(target=watch.run, name=f"pods-{role}", daemon=True) for role, watch in watches.items()
        ]
        for thread in threads:
            thread.start()
        try:
            await asyncio.Event().wait()
        finally:
            await _stop(list(watches.values()), threads)

    def _watch(self, loop: asyncio.AbstractEventLoop, role: Role, selector: str, found: Found) -> PodWatch:
        from router.cluster import make_api_client
        from router.pod_watch import PodWatch

        def on_urls(urls: frozenset[str]) -> None:
            loop.call_soon_threadsafe(self._hear, role, urls, found)

        def on_fault(fault: Fault) -> None:
            self._faults[fault].inc()

        return PodWatch(make_api_client(), self._namespace, selector, self._settings.kubernetes_port, on_urls, on_fault)

    def _hear(self, role: Role, urls: frozenset[str], found: Found) -> None:
        self._urls[role] = urls
        self._pods[role].set(len(urls))
        if len(self._urls) < len(Role):  # until both are known, half of the engines would look like all
            return
        self._engines = frozenset(self._with_one_role_each())
        found(self._engines)

    def _with_one_role_each(self) -> Collection[Endpoint]:
        """While a pod's label changes, both selectors may match it for a moment: until then it keeps its role."""
        both = self._urls[Role.PREFILL] & self._urls[Role.DECODE]
        kept = {engine for engine in self._engines if engine.url in both}
        new = {Endpoint(Role.PREFILL, url) for url in both - {engine.url for engine in kept}}
        if both:
            logger.warning("both selectors match the pods of %s: they keep the role they have", ", ".join(sorted(both)))
        return kept | new | {Endpoint(role, url) for role, urls in self._urls.items() for url in urls - both}


async def _stop(watches: list[PodWatch], threads: list[threading.Thread]) -> None:
    deadline = asyncio.get_running_loop().time() + STOP_SECONDS
    while any(thread.is_alive() for thread in threads) and asyncio.get_running_loop().time() < deadline:
        for watch in watches:  # again, because a call that is about to be made does not notice
            watch.stop()
        await asyncio.sleep(0.02)


def check_discovery(settings: RouterSettings) -> None:
    """Raises ValueError for options that don't go together, and for a cluster or a file that can't be read."""
    if settings.discovery != "static" and (settings.prefill_urls or settings.decode_urls):
        raise ValueError(f"--prefill-urls and --decode-urls are for --discovery static, not {settings.discovery}")
    if (settings.discovery == "file") != (settings.engines_file is not None):
        raise ValueError("--discovery file and --engines-file go together")
    if settings.engines_file is not None:
        read_engines(settings.engines_file)
    if settings.discovery == "kubernetes":
        if not settings.kubernetes_selector_decode:
            raise ValueError("--discovery kubernetes needs --kubernetes-selector-decode")
        from router.cluster import make_api_client

        make_api_client()
    elif settings.kubernetes_selector_prefill or settings.kubernetes_selector_decode:
        raise ValueError("--kubernetes-selector-prefill and -decode need --discovery kubernetes")


def make_discovery(settings: RouterSettings, registry: CollectorRegistry) -> Discovery:
    """By --discovery."""
    if settings.discovery == "kubernetes":
        return KubernetesDiscovery(settings, registry)
    if settings.discovery == "file":
        assert settings.engines_file is not None
        return FileDiscovery(settings.engines_file)
    return StaticDiscovery()
