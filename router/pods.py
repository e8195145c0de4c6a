"""Reads what Kubernetes' API says of a pod: whether it is an engine that takes requests, and where it listens.

Objects are what the API sends as JSON (https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1/).
"""

from __future__ import annotations

import ipaddress
import logging
from typing import Any

logger = logging.getLogger(__name__)


class MalformedPod(Exception):
    """The API sent something that is not a pod."""


def pod_name(pod: Any) -> str:
    """Raises MalformedPod."""
    try:
        name = pod["metadata"]["name"]
    except (TypeError, KeyError) as error:
        raise MalformedPod(f"a pod without a name: {str(pod)[:200]}") from error
    if not isinstance(name, str) or not name:
        raise MalformedPod(f"a pod whose name is {name!r}")
    return name


def engine_url(pod: Any, port: str) -> str | None:
    """`http://<pod IP>:<port>` of a pod that takes requests; None if it is not ready, or is being deleted.

    `port` is a number, or the name of a container's port. Raises MalformedPod.
    """
    name = pod_name(pod)
    try:
        if pod["metadata"].get("deletionTimestamp") or not _is_ready(pod.get("status") or {}):
            return None
        address = ipaddress.ip_address(pod["status"]["podIP"])
        number = int(port) if port.isdecimal() else _named_port(pod, port)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise MalformedPod(f"the pod {name} can't be read: {error!r}") from error
    if number is None:
        logger.warning("the pod %s is ready, but none of its containers has a port named %r", name, port)
        return None
    return f"http://[{address}]:{number}" if address.version == 6 else f"http://{address}:{number}"


def _is_ready(status: dict[str, Any]) -> bool:
    """What Services go by too: the condition that the probes of all containers, and readiness gates, make true."""
    return any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions") or ())


def _named_port(pod: dict[str, Any], name: str) -> int | None:
    ports = [port for container in pod["spec"]["containers"] for port in container.get("ports") or ()]
    return next((int(port["containerPort"]) for port in ports if port.get("name") == name), None)
