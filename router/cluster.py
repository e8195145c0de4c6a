"""How to reach Kubernetes' API: from a pod with its service account, else as kubectl does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def make_api_client() -> ApiClient:
    """For one thread. Raises ValueError with what is missing, in one sentence."""
    from kubernetes import client, config  # half a second, and only for those who use it

    settings = client.Configuration()
    try:
        if "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config(client_configuration=settings)
        else:
            config.load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=settings)
    except (config.ConfigException, OSError) as error:
        raise ValueError(
            "--discovery kubernetes finds no way to the API server: in a pod it needs the service account's token "
            f"(automountServiceAccountToken), elsewhere a kubeconfig: {error}"
        ) from error
    settings.retries = False  # urllib3's own, without a pause and in nobody's sight
    return client.ApiClient(settings)


def own_namespace() -> str:
    """This pod's; outside of a cluster that of the kubeconfig's context, or else default."""
    from kubernetes import config

    if OWN_NAMESPACE.exists():
        return OWN_NAMESPACE.read_text().strip()
    try:
        _, context = config.list_kube_config_contexts(os.environ.get("KUBECONFIG"))
    except (config.ConfigException, OSError):
        return "default"
    return str(context["context"].get("namespace") or "default")
