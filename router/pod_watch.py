"""Follows the pods that a label selector matches: list, then watch from the list's resource version.

    run      never ends; after anything that goes wrong it waits, longer each time, and lists again
    _list    all pods, and the resource version that they are of
    _watch   changes since then; one call after the other, each of WATCH_SECONDS, because a connection that a proxy
             dropped in silence looks like a quiet one

The official client is synchronous, so this runs on a thread of its own. Its `Watch` reads the events; its informer is
not used: after an error it tries again at once, for ever, and it has no limit on a call.
Protocol: https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes
"""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from kubernetes.client import ApiException, CoreV1Api
from kubernetes.watch import Watch
from urllib3.exceptions import HTTPError

from router.pods import MalformedPod, engine_url, pod_name

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

logger = logging.getLogger(__name__)

WATCH_SECONDS = 60  # of one call; also how late a change comes at most, if the connection to the API server is lost
LATE_SECONDS = 15.0  # that the server may be late with the end of such a call
CONNECT_SECONDS = 5.0
LIST_SECONDS = 30.0
QUICK_END = 1.0  # s; a watch that ends sooner, without an event, was turned away
BASE_PAUSE, MAX_PAUSE = 0.5, 30.0  # s


class Fault(StrEnum):
    """Why the pods had to be listed again. The values are labels of a metric."""

    EXPIRED = "expired"  # 410: the resource version is older than what the API server remembers
    REFUSED = "refused"  # another error of the API server
    UNREACHABLE = "unreachable"  # nothing came back, or it broke off
    MALFORMED = "malformed"  # what came back is not what the API is to send


class PodWatch:
    """The engines among the pods of one selector.

    Args:
        api_client: of this watch alone; it is not safe to share between threads.
        selector: a label selector, as `kubectl get pods -l` takes it.
        port: number or name of the engines' port.
        on_urls: called on the watch's thread with the URLs of all engines, at first and when they change.
        on_fault: called there too, each time that something went wrong.
    """

    def __init__(
        self,
        api_client: ApiClient,
        namespace: str,
        selector: str,
        port: str,
        on_urls: Callable[[frozenset[str]], None],
        on_fault: Callable[[Fault], None],
    ) -> None:
        self._api_client = api_client
        self._list_pods: Any = CoreV1Api(api_client).list_namespaced_pod  # typed as if it always made models
        self._which = {"namespace": namespace, "label_selector": selector}
        self._what = f"pods of {selector} in namespace {namespace}"
        self._port = port
        self._on_urls = on_urls
        self._on_fault = on_fault
        self._stopped = threading.Event()
        self._call: Watch | None = None
        self._urls: dict[str, str | None] = {}  # by pod
        self._told: frozenset[str] | None = None
        self._num_failed = 0

    def stop(self) -> None:
        """From any thread: `run` returns as soon as the call that it is in has noticed."""
        self._stopped.set()
        if self._call is not None:
            self._call.stop()

    def run(self) -> None:
        """Returns after `stop`."""
        with self._api_client:
            self._run()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._watch(self._list())
            except ApiException as error:
                self._failed(Fault.EXPIRED if error.status == 410 else Fault.REFUSED, _said(error))
            except (HTTPError, OSError) as error:
                self._failed(Fault.UNREACHABLE, f"the API server can't be reached: {error}")
            except Exception as error:  # noqa: BLE001 - what the client makes of nonsense is anything, and it must go on
                self._failed(Fault.MALFORMED, f"the API server's answer can't be read: {error!r}")

    def _list(self) -> str:
        response = self._list_pods(
            **self._which, _preload_content=False, _request_timeout=(CONNECT_SECONDS, LIST_SECONDS)
        )
        pods = json.loads(response.data)
        version: str = pods["metadata"]["resourceVersion"]
        self._urls = {pod_name(pod): engine_url(pod, self._port) for pod in pods["items"]}
        self._tell()
        return version

    def _watch(self, version: str) -> None:
        while not self._stopped.is_set():
            begin, num_events = time.monotonic(), 0
            # The objects stay the dicts that came: pydantic models of pods would cost more, and refuse new fields.
            self._call = call = Watch(return_type="object")
            events = call.stream(
                self._list_pods,
                **self._which,
                resource_version=version,
                allow_watch_bookmarks=True,
                timeout_seconds=WATCH_SECONDS,
                _request_timeout=(CONNECT_SECONDS, WATCH_SECONDS + LATE_SECONDS),
            )
            for event in events:
                if self._stopped.is_set():
                    return
                self._apply(event)
                num_events += 1
                self._num_failed = 0
            version = call.resource_version or version
            if num_events or time.monotonic() - begin >= QUICK_END:
                self._num_failed = 0
            elif not self._stopped.is_set():
                self._failed(Fault.UNREACHABLE, "the API server ends a watch as soon as it begins")

    def _apply(self, event: Mapping[str, Any] | None) -> None:
        if event is None:  # the client's word for a line that is no JSON
            raise MalformedPod("an event is not JSON")
        kind, pod = event["type"], event["object"]
        if kind in ("ADDED", "MODIFIED"):
            self._urls[pod_name(pod)] = engine_url(pod, self._port)
        elif kind == "DELETED":
            self._urls.pop(pod_name(pod), None)
        elif kind != "BOOKMARK":  # whose version the client has noted already
            raise MalformedPod(f"an event is of type {kind!r}")
        self._tell()

    def _tell(self) -> None:
        urls = frozenset(url for url in self._urls.values() if url is not None)
        if urls != self._told and not self._stopped.is_set():
            self._told = urls
            self._on_urls(urls)

    def _failed(self, fault: Fault, why: str) -> None:
        """Waits before the next try: exponential with jitter, so that routers don't come back all at once."""
        if self._stopped.is_set():
            return
        self._on_fault(fault)
        pause = random.uniform(0.5, 1.0) * min(MAX_PAUSE, BASE_PAUSE * 2 ** min(self._num_failed, 8))
        self._num_failed += 1
        level = logging.INFO if fault is Fault.EXPIRED else logging.WARNING
        logger.log(level, "discovery of %s: %s; engines stay, next try in %.1f s", self._what, why, pause)
        self._stopped.wait(pause)


def _said(error: ApiException) -> str:
    if error.status in (401, 403):
        return (
            f"the API server refuses with status {error.status}: the router's service account needs a Role that may "
            "list and watch pods"
        )
    return f"the API server answers with status {error.status}: {error.reason}"
