"""How the GPUs of a comparison are used: `tp4`, `dp4`, `dp2tp2`, `tp4dcp2`, and ours, `t1p4` or `t2p2`. `t1p1` is plain
vLLM on one GPU.

Ours with less: `t1p4-serial` has no overlapping micro-batches, `t1p4-piecewise` no FULL CUDA graphs either. With
`-spread` the weights are divided among the workers of all ranks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bench.shapes import Shape


@dataclass(frozen=True)
class Setup:
    """`num_replicas` engines of `tensor_parallel_size` x `token_parallel_size` GPUs each."""

    name: str
    num_replicas: int
    tensor_parallel_size: int
    token_parallel_size: int
    decode_context_parallel_size: int = 1
    variant: str = ""
    """`serial`, `piecewise` or `spread`, see above."""

    @classmethod
    def parse(cls, name: str) -> Setup:
        """Raises ValueError for a name of another form."""
        if ours := re.fullmatch(r"t(\d+)p(\d+)(?:-(serial|piecewise|spread))?", name):
            return cls(name, 1, int(ours[1]), int(ours[2]), variant=ours[3] or "")
        if name and (stock := re.fullmatch(r"(?:dp(\d+))?(?:tp(\d+)(?:dcp(\d+))?)?", name)):
            return cls(name, int(stock[1] or 1), int(stock[2] or 1), 1, int(stock[3] or 1))
        raise ValueError(f"a setup is tp<N>, dp<N>, dp<N>tp<N>, tp<N>dcp<N> or t<N>p<N>, not {name!r}")

    @property
    def is_ours(self) -> bool:
        return self.token_parallel_size > 1

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left out to see what it is worth."""
        return self.variant in ("", "spread")

    @property
    def gpus_per_replica(self) -> int:
        return self.tensor_parallel_size * self.token_parallel_size

    @property
    def num_gpus(self) -> int:
        return self.num_replicas * self.gpus_per_replica

    def floor_seconds(self, shape: Shape, batch: int, context: int, bytes_per_second: float) -> float:
        """The least that a step can take: every byte of KV cache and of each replica's weights is read once, spread
        perfectly over all GPUs.

        Args:
            batch: sequences of all replicas together.
            bytes_per_second: memory bandwidth of one GPU.
        """
        # Tensor parallelism over more GPUs than there are KV heads copies the KV cache.
        copies = max(1, self.tensor_parallel_size // (shape.num_kv_heads * self.decode_context_parallel_size))
        kv = batch * context * shape.kv_bytes_per_token * copies
        return (kv + self.num_replicas * shape.weight_bytes) / (self.num_gpus * bytes_per_second)
