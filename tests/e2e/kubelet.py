"""Runs pods of rendered manifests as a kubelet would: init containers, volumes, probes, and how a pod is ended.

Each pod has a host of its own (tests/e2e/hosts.py), whose address is the pod's. `Proxy` stands for kube-proxy.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
from kubernetes.utils.quantity import parse_quantity

from tests.e2e.container import Container, container_env
from tests.e2e.hosts import Host
from tests.e2e.processes import START_SECONDS

PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


@dataclass(frozen=True)
class Cluster:
    """What a cluster gives to all of its pods."""

    namespace: str
    names: Mapping[str, str]  # addresses by DNS name
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """How a pod that was told to end did so."""

    exit_code: int
    seconds: float
    was_killed: bool  # its grace period was not enough


class Pod:
    """One pod, started at once. `is_ready` follows its probes; what goes wrong on the way stands in `fault`.

    Args:
        template: `metadata` and `spec` of a workload's template, or of a pod.
        secrets: more folders that its containers see, by path, such as the service account's token.
    """

    def __init__(
        self,
        name: str,
        template: Mapping[str, Any],
        host: Host,
        cluster: Cluster,
        folder: Path,
        secrets: Mapping[str, Path] | None = None,
    ) -> None:
        self.name = name
        self.spec = template["spec"]
        self.host = host
        self.is_ready = False
        self.fault = ""
        self.probed: list[tuple[str, bool]] = []  # every probe, in order, and whether it succeeded
        self.main: Container | None = None
        self._folder = folder / name
        self._folder.mkdir(parents=True)
        self._cluster = cluster
        self._secrets = dict(secrets or {})
        self._volumes: dict[str, Path] = {}
        self._memory: list[Path] = []  # volumes that are file systems of their own
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://{self.host.address}:{self.port('http')}"

    def log(self) -> str:
        return f"{self.name} ({self.fault or 'no fault'}):\n{self.main.tail() if self.main else 'not started'}"

    def wait(self, seconds: float) -> int:
        """The exit code of a pod that ends by itself."""
        self._thread.join(seconds)
        assert self.main is not None, self.fault
        return self.main.process.wait(seconds)

    def terminate(self) -> Ended:
        """As when the pod is deleted: the preStop hook, SIGTERM, and SIGKILL when the grace period is over."""
        assert self.main is not None
        began, grace = time.monotonic(), float(self.spec["terminationGracePeriodSeconds"])
        self._ending.set()
        container = self.spec["containers"][0]
        if hook := container.get("lifecycle", {}).get("preStop"):
            self.main.exec(hook["exec"]["command"], grace)
        was_killed = False
        self.main.kill(signal.SIGTERM)
        try:
            self.main.process.wait(max(0.0, began + grace - time.monotonic()))
        except subprocess.TimeoutExpired:
            was_killed = True
            self.main.kill()
        return Ended(self.main.process.wait(30), time.monotonic() - began, was_killed)

    def remove(self) -> None:
        """Ends what still runs, at once, and gives its volumes back."""
        self._ending.set()
        if self.main is not None and self.main.process.poll() is None:
            self.main.kill()
            self.main.process.wait(30)
        self._thread.join(60)
        for path in self._memory:
            subprocess.run(["umount", path], check=True)

    def _run(self) -> None:
        try:
            self._make_volumes()
            for container in self.spec.get("initContainers", ()):
                started = self._start(container)
                if code := started.process.wait(START_SECONDS):
                    raise RuntimeError(f"init container {started.name} ended with {code}:\n{started.tail()}")
            self.main = self._start(self.spec["containers"][0])
            if self.spec.get("restartPolicy") != "Never":
                self._probe(self.main, self.spec["containers"][0])
        except Exception as error:  # noqa: BLE001 - the test reads it
            self.fault = str(error)

    def _make_volumes(self) -> None:
        for volume in self.spec.get("volumes", ()):
            path = self._folder / "volumes" / volume["name"]
            path.mkdir(parents=True)
            about = volume["emptyDir"]  # the only kind that the CPU profile uses
            if about.get("medium") == "Memory":
                size = int(parse_quantity(about["sizeLimit"]))
                subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "volume", path], check=True)
                self._memory.append(path)
            os.chown(path, 0, self.spec["securityContext"]["fsGroup"])
            path.chmod(0o2777)
            self._volumes[volume["name"]] = path

    def _start(self, container: Mapping[str, Any]) -> Container:
        fields = {"status.podIP": self.host.address, "metadata.name": self.name}
        hosts_file = self._folder / "hosts"
        lines = [f"{address} {name}" for name, address in self._cluster.names.items()]
        hosts_file.write_text("\n".join(["127.0.0.1 localhost", f"{self.host.address} {self.host.name}", *lines, ""]))
        return Container(
            self.host,
            self.spec,
            container,
            container_env(container, fields, self._cluster.env),
            folder=self._folder,
            hosts_file=hosts_file,
            mounts=self._volumes,
            extra_mounts=self._secrets,
        )

    def _probe(self, running: Container, container: Mapping[str, Any]) -> None:
        """Until the container ends: the startup probe first, then the other two, each at its own pace."""
        next_at = dict.fromkeys(PROBES, time.monotonic())
        failures = dict.fromkeys(PROBES, 0)
        has_started = False
        while (code := running.process.poll()) is None:
            for kind in PROBES[1:] if has_started else PROBES[:1]:
                probe, now = container[kind], time.monotonic()
                if now < next_at[kind] or (self._ending.is_set() and kind != "readinessProbe"):
                    continue
                next_at[kind] = now + probe["periodSeconds"]
                is_good = self._ask(probe)
                self.probed.append((kind, is_good))
                failures[kind] = 0 if is_good else failures[kind] + 1
                has_started |= kind == "startupProbe" and is_good
                if kind == "readinessProbe":
                    self.is_ready = is_good or (self.is_ready and failures[kind] < probe["failureThreshold"])
                elif failures[kind] >= probe["failureThreshold"]:
                    running.kill()
                    raise RuntimeError(f"{kind} failed {failures[kind]} times:\n{running.tail()}")
            time.sleep(0.1)
        self.is_ready = False
        if not self._ending.is_set():
            raise RuntimeError(f"container {running.name} ended with {code}:\n{running.tail()}")

    def _ask(self, probe: Mapping[str, Any]) -> bool:
        about = probe["httpGet"]
        url = f"http://{self.host.address}:{self.port(about['port'])}{about['path']}"
        with contextlib.suppress(requests.RequestException):
            return requests.get(url, timeout=probe["timeoutSeconds"]).status_code < 400
        return False

    def port(self, name: str) -> int:
        (port,) = [port["containerPort"] for port in self.spec["containers"][0]["ports"] if port["name"] == name]
        return int(port)


class Proxy:
    """Takes connections to a service's port, and hands each on to a pod: to the address and port of `choose`."""

    def __init__(self, address: str, port: int, choose: Callable[[], tuple[str, int]]) -> None:
        self._choose = choose
        self._server = socket.create_server((address, port))
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)  # ends the accept
        self._server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._server.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(self._choose(), 5) as pod:
            pod.settimeout(None)
            back = threading.Thread(target=_copy, args=(pod, client), daemon=True)
            back.start()
            _copy(client, pod)
            back.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
