"""What the packed path uses of NIXL's agent, and takes for given of vLLM's KV caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import pull_worker
from vllm.distributed.nixl_utils import NixlWrapper
from vllm.v1.attention.backends import cpu_attn

from tests.services.contract import require, source

AGENT, STAGING, FP8 = "kv_transfer/packed/agent.py", "kv_transfer/packed/staging.py", "kv_transfer/packed/fp8.py"

Worker: Any = pull_worker.NixlPullConnectorWorker


@pytest.mark.parametrize(
    "name",
    [
        *("get_reg_descs", "register_memory", "deregister_memory", "get_agent_metadata", "add_remote_agent"),
        *("remove_remote_agent", "initialize_xfer", "transfer", "check_xfer_state", "release_xfer_handle"),
    ],
)
def test_the_agent_has_these_methods(name: str) -> None:
    require(callable(getattr(NixlWrapper, name, None)), name, STAGING)


def test_a_read_that_can_t_be_made_or_fails_is_a_failed_transfer() -> None:
    """Whatever is raised; the connection is then made anew (kv_transfer/worker.py)."""
    for method in (Worker._read_blocks, Worker._pop_done_transfers):
        handled = source(method).partition("except Exception")[2]
        require("self._handle_failed_transfer(" in handled, f"who handles failures in {method.__name__}", AGENT)


def test_keys_and_values_lie_in_a_block_like_this() -> None:
    """As text: FlashAttention's module is not for machines without CUDA."""
    on_host = source(cpu_attn.CPUAttentionBackendImpl.forward)
    require("(num_blocks, num_kv_heads, block_size * 2, -1)" in on_host, "blocks on CPUs", FP8)
    require("key_cache, value_cache = kv_cache.chunk(2, dim=2)" in on_host, "blocks on CPUs", FP8)
    on_gpu = (Path(cpu_attn.__file__).parent / "flash_attn.py").read_text()
    require("kv_cache.transpose(1, 2).split(self.head_size, dim=-1)" in on_gpu, "blocks of FlashAttention", FP8)
