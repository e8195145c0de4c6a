"""What is compared with plain vLLM on GPUs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tests.gpu.engine import EngineSpec

_FEW_REQUESTS = 10


@dataclass(frozen=True)
class Case:
    """Ours, the plain vLLM that it must equal, and plain vLLM once more with other chunks and as few requests in a step
    as the ranks here hold (compare.verdict).

    Attributes:
        micro_batches: in which steps of several requests replay graphs.
        control_ways: tensor-parallel size of the control, where it is another: what vLLM itself rounds otherwise when
            weights are divided in other parts, which spread weights are.
    """

    ours: EngineSpec
    plain: EngineSpec
    micro_batches: tuple[int, ...] = (1,)
    control_ways: int | None = None

    @property
    def control(self) -> EngineSpec:
        ways = self.control_ways or self.plain.tensor_parallel_size
        name = f"{self.plain.name}-control" + (f"-tp{ways}" if self.control_ways else "")
        return replace(self.plain, name=name, chunk=96, max_num_seqs=_FEW_REQUESTS, tensor_parallel_size=ways)

    @property
    def engines(self) -> tuple[EngineSpec, ...]:
        return (self.plain, self.control, self.ours)

    @property
    def num_gpus(self) -> int:
        return max(engine.num_gpus for engine in self.engines)


_TP1 = EngineSpec("tp1")
_TP2 = EngineSpec("tp2", tensor_parallel_size=2)
_FLOAT = EngineSpec("float32", dtype="float32", attention="TRITON_ATTN")
_GEMMA = EngineSpec("gemma2", model="gemma2", num_roundings=4)
_MOE = EngineSpec("mixtral", model="mixtral")
_MQA_FLOAT = replace(_FLOAT, name="multi_query-float32", model="multi_query")
# Spread weights are divided as tensor parallelism divides them, which rounds each partial sum.
_MQA_TP2 = EngineSpec("multi_query-tp2", model="multi_query", tensor_parallel_size=2)
_FEW_HEADS = EngineSpec("two_kv_heads", model="two_kv_heads", tensor_parallel_size=4)
_FEW_HEADS_FLOAT = replace(_FLOAT, name="two_kv_heads-float32", model="two_kv_heads", tensor_parallel_size=4)
_FP8 = EngineSpec("fp8-weights", weights="fp8")
_W4A16 = EngineSpec("w4a16", model="llama-w4a16")


def _ours(plain: EngineSpec, name: str, ranks: int = 2, roots: int = 1, variant: str = "") -> EngineSpec:
    return replace(plain, name=name, token_parallel_size=ranks, tensor_parallel_size=roots, variant=variant)


CASES = [
    Case(_ours(_TP1, "t1p2"), _TP1, micro_batches=(2,)),
    Case(_ours(_TP1, "t1p2-chosen", variant="chosen"), _TP1, micro_batches=(1, 2)),
    Case(_ours(_TP1, "t1p2-serial", variant="serial"), _TP1),
    Case(_ours(_TP1, "t1p2-piecewise", variant="piecewise"), _TP1, micro_batches=()),
    Case(_ours(_FLOAT, "t1p2-float32"), _FLOAT, micro_batches=(2,)),
    Case(_ours(_FLOAT, "t1p2-chosen-float32", variant="chosen"), _FLOAT, micro_batches=(1, 2)),
    Case(_ours(_GEMMA, "t1p2-gemma2"), _GEMMA, micro_batches=(2,)),
    Case(_ours(_MOE, "t1p2-mixtral"), _MOE),
    Case(_ours(_FP8, "t1p2-fp8-weights"), _FP8),
    Case(_ours(_W4A16, "t1p2-w4a16"), _W4A16),
    Case(_ours(_MQA_TP2, "t1p2-spread", variant="spread"), _MQA_TP2, control_ways=1),
    Case(_ours(_MQA_FLOAT, "t1p2-spread-float32", variant="spread"), _MQA_FLOAT),
    Case(_ours(_FEW_HEADS, "t2p2-spread", roots=2, variant="spread"), _FEW_HEADS, control_ways=2),
    Case(_ours(_FEW_HEADS_FLOAT, "t2p2-spread-float32", roots=2, variant="spread"), _FEW_HEADS_FLOAT),
    Case(_ours(_TP1, "t1p4", ranks=4), _TP1, micro_batches=(2,)),
    Case(_ours(_TP2, "t2p2", roots=2), _TP2, micro_batches=(2,)),
    Case(_ours(_TP2, "t2p2-chosen", roots=2, variant="chosen"), _TP2, micro_batches=(1, 2)),
    Case(_ours(_TP2, "t2p2-serial", roots=2, variant="serial"), _TP2),
    Case(_ours(_FLOAT, "t2p2-float32", roots=2), _FLOAT, micro_batches=(2,)),
]
