"""The policies by name: every module of this package is one. router/candidates.py says what a policy is."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from router.candidates import Policy


def load_policies() -> dict[str, Policy]:
    """Name -> function, sorted by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: import_module(f"{__name__}.{name}").choose for name in names}
