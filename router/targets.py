"""`GET /metrics/targets`: this router and its engines, as Prometheus' HTTP service discovery reads them.

The format: https://prometheus.io/docs/prometheus/latest/http_sd/
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.responses import JSONResponse

if TYPE_CHECKING:
    from router.state import RouterState


async def metric_targets(request: Request) -> JSONResponse:
    """Engines that are down too, for Prometheus to tell so. The router's address is the one that it was asked at."""
    state: RouterState = request.app.state.router
    engines = [_target(engine.endpoint.role, engine.endpoint.url) for engine in state.pool.engines]
    return JSONResponse([_target("router", str(request.base_url)), *engines])


def _target(component: str, url: str) -> dict[str, list[str] | dict[str, str]]:
    split = urlsplit(url)
    return {"targets": [split.netloc], "labels": {"component": component, "__scheme__": split.scheme}}
