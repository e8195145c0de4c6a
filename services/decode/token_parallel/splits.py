"""How many parts FlashAttention 3 cuts each sequence of a decode step into, so that no multiprocessor is left over.

A step is `rows x KV heads` pieces of work, each streamed from memory by one multiprocessor. FlashAttention cuts them
only where one piece is more than a multiprocessor's share of all, and then so that the parts make little more than one
round: 88 rows of one head make 176 halves, of which 44 run alone on 132 multiprocessors. In three parts each they make
two full rounds: 350 us instead of 407 for 32,768 tokens on an H200. The constants are fitted to
`python -m bench.attention`: by them the parts chosen take 0.3 % longer than the best ones on average, and 4 % at
most, where FlashAttention's own take 7 and 29 %.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK = 128  # tokens that a piece of work advances by
_MAX_SPLITS = 5
# Few readers don't use all of the bandwidth, so a round that is not full takes longer than its share of a full one;
# less so after others, whose last pieces it runs beside.
_LEAST_ROUND = 0.65
_ONLY_ROUND = 1.2
_FLASH_MARGIN = 1.1  # FlashAttention's own, in prepare_varlen_num_blocks_kernel


def choose_splits(num_waves: float, num_blocks: int) -> int:
    """Parts for each of the longest sequences.

    Args:
        num_waves: all work, in rounds of one longest piece on each multiprocessor.
        num_blocks: that a longest piece has. A further part costs as much as one of them, to write and to combine.
    """

    def rounds(splits: int) -> float:
        full, rest = divmod(num_waves * splits, 1.0)
        tail = min(1.0, max(_LEAST_ROUND, rest if full else _ONLY_ROUND * rest)) if rest > 1e-6 else 0.0
        return (full + tail) / splits + (splits - 1) / num_blocks

    return min(range(1, _MAX_SPLITS + 1), key=rounds)


def margin_for(splits: int, work: int, num_blocks: int, num_sms: int) -> int:
    """The `sm_margin` with which FlashAttention cuts sequences of `num_blocks` blocks into so many parts, where they
    can be divided so; `work` is the blocks of all sequences and KV heads."""
    return num_sms - int(_FLASH_MARGIN * work / -(-num_blocks // splits))


def sm_margin(seq_lens: npt.NDArray[np.int32], num_kv_heads: int, num_sms: int) -> int:
    """The `sm_margin` by which `get_scheduler_metadata` cuts sequences into the parts that suit this step.

    It divides `1.1 x blocks x heads` by the number of multiprocessors less the margin, and cuts a sequence that has
    more blocks than that. So a negative margin makes the parts smaller, and one above 0 larger; nothing else depends
    on it.
    """
    blocks = -(-seq_lens.astype(np.int64) // BLOCK)
    longest = int(blocks.max(initial=0))
    if longest < 2:
        return 0
    work = int(blocks.sum()) * num_kv_heads
    splits = choose_splits(work / (num_sms * longest), longest)
    margin = margin_for(splits, work, longest, num_sms)
    if splits == 1:
        return max(0, margin)  # none where it does not cut anyway
    return min(0, margin) if splits == _MAX_SPLITS else margin  # it may know better where there is hardly any work


def splitting(inner: type[Any]) -> type[Any]:
    """A subclass of vLLM's FlashAttention metadata builder that plans with `sm_margin`; any other builder as it is."""
    if inner.__name__ != "FlashAttentionMetadataBuilder":
        return inner
    from vllm.utils.platform_utils import num_compute_units
    from vllm.v1.attention.backends.fa_utils import get_scheduler_metadata

    class SplittingBuilder(inner):
        _margin = 0

        def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
            seq_lens = common_attn_metadata.seq_lens_cpu_upper_bound.numpy()
            self._margin = sm_margin(seq_lens, self.num_heads_kv, num_compute_units(self.device.index))
            return super().build(common_prefix_len, common_attn_metadata, fast_build)

        def _get_scheduler_metadata(self, **given: Any) -> Any:
            windowed = self.aot_sliding_window != (-1, -1)
            if windowed or not given["aot_schedule"] or given["max_num_splits"] < 2 or not self._margin:
                return super()._get_scheduler_metadata(**given)
            return get_scheduler_metadata(
                batch_size=given["batch_size"],
                max_seqlen_q=given["max_query_len"],
                max_seqlen_k=given["max_seq_len"],
                num_heads_q=self.num_heads_q,
                num_heads_kv=self.num_heads_kv,
                headdim=self.headdim,
                cache_seqlens=given["seqlens"],
                qkv_dtype=self.kv_cache_dtype,
                cu_seqlens_q=given["cu_query_lens"],
                page_size=self.block_size,
                causal=given["causal"],
                window_size=self.aot_sliding_window,
                num_splits=given["max_num_splits"],
                sm_margin=self._margin,
            )

    return SplittingBuilder
