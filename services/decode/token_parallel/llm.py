"""Offline inference with token parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm import LLM

from services.decode.token_parallel.engine_args import engine_args
from services.decode.token_parallel.options import ON_ROOTS, TokenParallelOptions


class TokenParallelLLM(LLM):
    """vLLM's `LLM` on `tensor_parallel_size * token_parallel_size` workers.

    >>> llm = TokenParallelLLM(model="...", tensor_parallel_size=2, token_parallel_size=4)
    >>> llm.generate(["Hello"])
    """

    def __init__(
        self,
        model: str,
        *,
        token_parallel_size: int = 1,
        blocks_per_rank: Sequence[int] | None = None,
        overlap_from: int | None = None,
        token_parallel_weights: str = ON_ROOTS,
        **kwargs: Any,
    ) -> None:
        """Args:
        token_parallel_size: number of token-parallel ranks; 1 is plain vLLM.
        blocks_per_rank, overlap_from, token_parallel_weights: see `TokenParallelOptions`.
        kwargs: vLLM's own.

        Raises:
            UnsupportedConfigurationError: something in `kwargs` cannot be combined with token parallelism.
        """
        blocks = tuple(blocks_per_rank) if blocks_per_rank else None
        options = TokenParallelOptions(token_parallel_size, blocks, overlap_from, weights=token_parallel_weights)
        ours = engine_args(
            options, kwargs.get("additional_config"), tensor_parallel_size=kwargs.get("tensor_parallel_size", 1)
        )
        super().__init__(model=model, **{**kwargs, **ours})

    def token_parallel_status(self) -> list[dict[str, Any]]:
        """What each worker reports: rank, KV blocks in all and free, requests, bytes of parameters and of KV cache."""
        return list(self.collective_rpc("token_parallel_status"))
