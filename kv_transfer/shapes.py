"""Which prefill engines' KV cache this engine can read, by how either divides it.

vLLM's connector asserts most of this, some of it without a word (nixl/base_worker.py, validate_remote_agent_handshake;
kv_connector/utils.py, TransferTopology). Requests from an engine that is refused compute their prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker


class UnreadableError(RuntimeError):
    """The KV cache of a prefill engine can't be read here; the message says why, and what to do."""


@dataclass(frozen=True)
class CacheShape:
    """How an engine divides a model's KV cache.

    Attributes:
        tensor_parallel_size: workers that share the KV heads; of a token-parallel engine, those of one rank.
        num_kv_heads: of the model.
        is_latent: multi-head latent attention, which has no heads to share.
    """

    tensor_parallel_size: int
    num_kv_heads: int
    is_latent: bool

    def check_workers(self, theirs: int) -> None:
        """Of a prefill engine with tensor-parallel size `theirs`.

        Raises:
            UnreadableError: it can't be read with ours.
        """
        ours = self.tensor_parallel_size
        if max(ours, theirs) % min(ours, theirs):
            raise UnreadableError(
                f"tensor-parallel sizes {theirs} (prefill) and {ours} (decode) don't fit: one must be a multiple of "
                "the other; change --tensor-parallel-size of either"
            )
        if theirs > max(ours, self.num_kv_heads) and not self.is_latent:
            raise UnreadableError(
                f"the prefill engine's {theirs} tensor-parallel workers hold copies of the model's {self.num_kv_heads} "
                f"KV heads, which a decode engine with {ours} can't put together; give the prefill engine "
                f"--tensor-parallel-size {max(ours, self.num_kv_heads)} at most"
            )

    def check_blocks(self, block_size: int, theirs: int, their_workers: int) -> None:
        """Of a prefill engine whose blocks have `theirs` tokens, and ours `block_size`.

        Raises:
            UnreadableError: blocks of theirs can't be put together to blocks of ours.
        """
        if block_size % theirs:
            raise UnreadableError(
                f"the prefill engine's blocks have {theirs} tokens and ours {block_size}, which is no multiple; give "
                f"this engine --block-size {theirs}, or a multiple of it"
            )
        if block_size != theirs and their_workers > self.tensor_parallel_size:
            raise UnreadableError(
                f"blocks of {theirs} tokens (prefill) and {block_size} (decode) don't fit where the prefill engine's "
                f"tensor-parallel size, {their_workers}, is larger than ours, {self.tensor_parallel_size}; give both "
                "engines the same --block-size"
            )


class ShapeCheckingWorker(NixlPullConnectorWorker):
    """vLLM's pull worker, which says at the handshake what does not fit."""

    def _nixl_handshake(self, host: str, port: int, remote_tp_size: int, *args: Any, **kwargs: Any) -> Any:
        self._their_workers = remote_tp_size  # handshakes are made one at a time (kv_transfer.handshakes)
        self._shape().check_workers(remote_tp_size)
        return super()._nixl_handshake(host, port, remote_tp_size, *args, **kwargs)

    def _validate_remote_parallel_config(self, agent_metadata: Any) -> None:
        super()._validate_remote_parallel_config(agent_metadata)
        assert self.transfer_topo is not None
        self._shape().check_blocks(self.transfer_topo.block_size, agent_metadata.block_size, self._their_workers)

    def _shape(self) -> CacheShape:
        return CacheShape(self.world_size, self.model_config.get_total_num_kv_heads(), bool(self.use_mla))
