"""How long FlashAttention 3 takes for decode steps on this GPU, and in how many parts its sequences are read fastest.

    python -m bench.attention OUTPUT.json

Attention alone, in CUDA graphs of ten calls each, medians of seven. `services/decode/token_parallel/splits.py` has its
constants from this.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from services.decode.token_parallel.splits import BLOCK, margin_for

CASES = [
    # (tokens, KV heads, query heads, rows)
    (8_192, 1, 24, (16, 32, 44, 52, 66, 88, 104, 120, 140)),
    (32_768, 1, 24, (16, 32, 44, 52, 66, 88, 104, 120)),
    (8_192, 8, 32, (16, 29, 36, 52)),
    (8_192, 2, 48, (26, 44, 52, 66, 88)),
    (1_024, 1, 24, (52, 104)),
]
PARTS = (1, 2, 3, 4, 5, 6, 8)
_HEAD_SIZE, _PAGE = 128, 16  # elements; tokens
_MOST_PARTS, _SPARE_PAGES = 32, 32
_CALLS, _REPEATS = 10, 7


@dataclass(frozen=True)
class AttentionRow:
    """One step's attention in one layer.

    Attributes:
        own_us: in the parts that FlashAttention chooses.
        us: by the parts that were asked for; of 8 blocks FlashAttention makes 4 where it is asked for 5 or 6.
        terabytes_per_second: of the fastest.
    """

    tokens: int
    num_kv_heads: int
    num_query_heads: int
    rows: int
    own_us: float
    us: dict[int, float]
    terabytes_per_second: float


def measure(num_sms: int) -> Iterator[AttentionRow]:
    for tokens, num_kv_heads, num_query_heads, row_counts in CASES:
        for rows in row_counts:
            step = _step(rows, tokens, num_kv_heads, num_query_heads)
            blocks = tokens // BLOCK
            margins = {parts: margin_for(parts, rows * blocks * num_kv_heads, blocks, num_sms) for parts in PARTS}
            us = {parts: _microseconds(step(margin)) for parts, margin in margins.items() if margin < num_sms}
            num_bytes = rows * tokens * num_kv_heads * _HEAD_SIZE * 2 * 2
            yield AttentionRow(
                tokens,
                num_kv_heads,
                num_query_heads,
                rows,
                _microseconds(step(0)),
                us,
                round(num_bytes / min(us.values()) / 1e6, 2),
            )


def _step(rows: int, tokens: int, num_kv_heads: int, num_query_heads: int) -> Callable[[int], Callable[[], Any]]:
    """Makes one attention of `rows` sequences with random pages, given its margin."""
    import torch
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    device, pages = "cuda", tokens // _PAGE
    cache = torch.randn(rows * pages, num_kv_heads, _PAGE, 2 * _HEAD_SIZE, device=device, dtype=torch.bfloat16)
    keys, values = cache.transpose(1, 2).split(_HEAD_SIZE, dim=-1)
    query = torch.randn(rows, num_query_heads, _HEAD_SIZE, device=device, dtype=torch.bfloat16)
    lens = torch.full((rows,), tokens, device=device, dtype=torch.int32)
    starts = torch.arange(rows + 1, device=device, dtype=torch.int32)
    # Wider than it need be, as vLLM's is: FlashAttention looks ahead.
    block_table = torch.zeros(rows, pages + _SPARE_PAGES, device=device, dtype=torch.int32)
    block_table[:, :pages] = torch.randperm(rows * pages, device=device).view(rows, pages)

    def with_margin(margin: int) -> Callable[[], Any]:
        plan = get_scheduler_metadata(
            batch_size=rows,
            max_seqlen_q=1,
            max_seqlen_k=tokens,
            num_heads_q=num_query_heads,
            num_heads_kv=num_kv_heads,
            headdim=_HEAD_SIZE,
            cache_seqlens=lens,
            qkv_dtype=torch.bfloat16,
            cu_seqlens_q=starts,
            page_size=_PAGE,
            causal=True,
            window_size=(-1, -1),
            num_splits=_MOST_PARTS,
            sm_margin=margin,
        )
        return lambda: flash_attn_varlen_func(
            q=query,
            k=keys,
            v=values,
            cu_seqlens_q=starts,
            max_seqlen_q=1,
            seqused_k=lens,
            max_seqlen_k=tokens,
            softmax_scale=_HEAD_SIZE**-0.5,
            causal=True,
            block_table=block_table,
            scheduler_metadata=plan,
            fa_version=3,
            num_splits=_MOST_PARTS,
        )

    return with_margin


def _microseconds(call: Callable[[], Any]) -> float:
    import torch

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # what is compiled or allocated at the first call must not be captured
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            call()
    graph.replay()
    times: list[float] = []
    for _ in range(_REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / _CALLS)
    return round(statistics.median(times), 1)


def main() -> None:
    import torch

    from bench.decode import environment

    properties = torch.cuda.get_device_properties(0)
    rows = []
    for row in measure(properties.multi_processor_count):
        rows.append(asdict(row))
        print(row, flush=True)
        record = {"environment": environment(), "num_sms": properties.multi_processor_count, "rows": rows}
        Path(sys.argv[1]).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
