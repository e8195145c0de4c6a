"""Which worker process is which token-parallel rank, and has which KV heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from services.decode.token_parallel.options import TokenParallelOptions

Value = TypeVar("Value")


@dataclass(frozen=True)
class WorkerGrid:
    """T x P workers: T shards of the KV heads, P token-parallel ranks.

    With weights on the roots alone, `worker = rank * T + shard`, and vLLM knows the first T workers, its
    tensor-parallel group. With weights spread over all workers, vLLM knows all of them as one tensor-parallel group of
    T x P, and `worker = shard * P + rank`: where there are more workers than KV heads, vLLM gives neighbours the same
    head (model_executor/layers/linear.py, QKVParallelLinear).
    """

    num_shards: int
    num_ranks: int
    is_spread: bool = False

    @classmethod
    def of(cls, vllm_config: Any) -> WorkerGrid:
        """Of an engine, from its configuration."""
        options = TokenParallelOptions.of(vllm_config)
        num_known: int = vllm_config.parallel_config.tensor_parallel_size
        return cls(num_known // options.size if options.is_spread else num_known, options.size, options.is_spread)

    @property
    def num_workers(self) -> int:
        return self.num_shards * self.num_ranks

    @property
    def num_known(self) -> int:
        """Workers that vLLM knows of: those with weights."""
        return self.num_workers if self.is_spread else self.num_shards

    def place(self, worker: int) -> tuple[int, int]:
        """Token-parallel rank and shard of a worker."""
        if self.is_spread:
            shard, rank = divmod(worker, self.num_ranks)
        else:
            rank, shard = divmod(worker, self.num_shards)
        return rank, shard

    def by_shard(self, of_worker: Sequence[Value]) -> list[list[Value]]:
        """Of each shard, its workers' values in the order of their ranks."""
        shards: list[list[Value]] = [[] for _ in range(self.num_shards)]
        for worker, value in enumerate(of_worker):
            shards[self.place(worker)[1]].append(value)
        return shards
