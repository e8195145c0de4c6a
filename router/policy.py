"""How an engine is chosen: a policy is one pure, synchronous function of the engines that can take the request.

Another policy is another file with such a function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from router.engines import Engine
    from router.types import GenerationRequest

Policy = Callable[[Sequence["Engine"], "GenerationRequest"], "Engine"]


def least_loaded(engines: Sequence[Engine], request: GenerationRequest) -> Engine:
    """The engine with the fewest requests outstanding; among equals the one that has had the fewest so far."""
    return min(engines, key=lambda engine: (engine.num_outstanding, engine.num_chosen))
