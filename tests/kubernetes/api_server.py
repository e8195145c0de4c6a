"""A real kube-apiserver with etcd on this machine, and what a cluster's other parts would do to pods.

No kubelet runs: the tests say when a pod is ready, and when a deleted one has gone.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kubernetes import client
from urllib3.exceptions import HTTPError

from tknp.common.ports import free_port

BINARIES = Path(__file__).parents[2] / ".kubernetes" / "bin" / "v1.20.2"
NAMESPACE = "llm"
ADMIN, ROUTER = "admin-token", "router-token"
START_SECONDS = 120.0


@dataclass
class ApiServer:
    url: str
    ca: Path
    etcd_url: str
    folder: Path
    has_watch_cache: bool

    def client(self, token: str = ADMIN) -> client.ApiClient:
        settings = client.Configuration()
        settings.host, settings.ssl_ca_cert = self.url, str(self.ca)
        settings.api_key, settings.api_key_prefix = {"BearerToken": token}, {"BearerToken": "Bearer"}
        return client.ApiClient(settings)

    def kubeconfig(self, token: str = ROUTER) -> Path:
        """What `KUBECONFIG` is to name."""
        path = self.folder / f"{token}.json"
        cluster = {"server": self.url, "certificate-authority-data": base64.b64encode(self.ca.read_bytes()).decode()}
        path.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "test",
                    "clusters": [{"name": "test", "cluster": cluster}],
                    "users": [{"name": "test", "user": {"token": token}}],
                    "contexts": [
                        {"name": "test", "context": {"cluster": "test", "user": "test", "namespace": NAMESPACE}}
                    ],
                }
            )
        )
        return path

    def forget_history(self) -> None:
        """Makes every resource version so far too old, as five minutes do in a cluster."""
        current = int(self.call_etcd("/v3/kv/range", key="AA==")["header"]["revision"])
        self.call_etcd("/v3/kv/compaction", revision=current, physical=True)

    def call_etcd(self, path: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(self.etcd_url + path, json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=10) as response:
            answer: dict[str, Any] = json.load(response)
        return answer


@contextmanager
def running_api_server(folder: Path, *, watch_cache: bool = True, address: str = "127.0.0.1") -> Iterator[ApiServer]:
    """`address`: where it listens."""
    etcd_port, peer_port, port = free_port(), free_port(), free_port()
    etcd_url = f"http://127.0.0.1:{etcd_port}"
    key, public = folder / "sa.key", folder / "sa.pub"
    subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
    subprocess.run(["openssl", "rsa", "-in", key, "-pubout", "-out", public], check=True, capture_output=True)
    tokens = folder / "tokens.csv"
    tokens.write_text(f"{ADMIN},admin,1,system:masters\n{ROUTER},system:serviceaccount:{NAMESPACE}:router,2\n")
    etcd = (
        *(BINARIES / "etcd", "--data-dir", folder / "etcd", "--listen-client-urls", etcd_url),
        *("--advertise-client-urls", etcd_url, "--listen-peer-urls", f"http://127.0.0.1:{peer_port}"),
    )
    server = (
        *(BINARIES / "kube-apiserver", f"--etcd-servers={etcd_url}", f"--secure-port={port}"),
        *(f"--bind-address={address}", f"--advertise-address={address}", f"--cert-dir={folder / 'certs'}"),
        *("--service-cluster-ip-range=10.0.0.0/24", "--service-account-issuer=https://test"),
        *(f"--service-account-signing-key-file={key}", f"--service-account-key-file={public}"),
        *(f"--token-auth-file={tokens}", "--authorization-mode=RBAC"),
        *("--disable-admission-plugins=ServiceAccount", f"--watch-cache={str(watch_cache).lower()}"),
    )
    processes = []
    try:
        for name, command in (("etcd", etcd), ("kube-apiserver", server)):
            with (folder / f"{name}.log").open("wb") as log:
                processes.append(subprocess.Popen([*map(str, command)], stdout=log, stderr=log, env={**os.environ}))
        api_server = ApiServer(
            f"https://{address}:{port}", folder / "certs" / "apiserver.crt", etcd_url, folder, watch_cache
        )
        _wait_ready(api_server, processes)
        yield api_server
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(30)


def _wait_ready(api_server: ApiServer, processes: list[subprocess.Popen[bytes]]) -> None:
    deadline, last = time.monotonic() + START_SECONDS, "no certificate yet"
    while True:
        if api_server.ca.exists():
            try:
                client.CoreV1Api(api_server.client()).list_namespace(_request_timeout=5)
                return
            except (client.ApiException, HTTPError, OSError) as error:
                last = str(error)
        ended = [process.args for process in processes if process.poll() is not None]
        if ended or time.monotonic() > deadline:
            raise RuntimeError(f"the API server did not come up: {ended or last}; logs in {api_server.folder}")
        time.sleep(0.1)


class Cluster:
    """Pods, and the rights of the router's service account."""

    def __init__(self, api_server: ApiServer) -> None:
        self.core: Any = client.CoreV1Api(api_server.client())  # takes the dicts that its types do not know of
        self._rights: Any = client.RbacAuthorizationV1Api(api_server.client())

    def prepare(self) -> None:
        """The namespace, and a Role that lets the router list and watch its pods and nothing else."""
        self.core.create_namespace({"metadata": {"name": NAMESPACE}})
        rules = [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]}]
        self._rights.create_namespaced_role(NAMESPACE, {"metadata": {"name": "router"}, "rules": rules})
        self._rights.create_namespaced_role_binding(
            NAMESPACE,
            {
                "metadata": {"name": "router"},
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "router"},
                "subjects": [{"kind": "ServiceAccount", "name": "router", "namespace": NAMESPACE}],
            },
        )

    def create(self, name: str, role: str, port: int) -> None:
        engine = {"name": "engine", "image": "tknp", "ports": [{"name": "http", "containerPort": port}]}
        self.core.create_namespaced_pod(
            NAMESPACE,
            {
                "metadata": {"name": name, "labels": {"app": "tknp", "role": role}},
                # On a node, so that deleting it takes its grace period, as it does where a kubelet is to end it.
                "spec": {"containers": [engine], "nodeName": "node", "automountServiceAccountToken": False},
            },
        )

    def set_ready(self, name: str, is_ready: bool = True) -> None:
        conditions = [{"type": "Ready", "status": "True" if is_ready else "False"}]
        status = {"phase": "Running", "podIP": "127.0.0.1", "conditions": conditions}
        self.core.patch_namespaced_pod_status(name, NAMESPACE, {"status": status})

    def relabel(self, name: str, role: str) -> None:
        self.core.patch_namespaced_pod(name, NAMESPACE, {"metadata": {"labels": {"role": role}}})

    def delete(self, name: str) -> None:
        """It is terminating from now on, and there until `bury`."""
        self.core.delete_namespaced_pod(name, NAMESPACE, grace_period_seconds=30)

    def bury(self, name: str) -> None:
        self.core.delete_namespaced_pod(name, NAMESPACE, grace_period_seconds=0)
