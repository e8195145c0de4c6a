from __future__ import annotations

from tests.services.conftest import llama, no_partition_left_over, quiet

__all__ = ["llama", "no_partition_left_over", "quiet"]
