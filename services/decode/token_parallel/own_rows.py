"""What attention needs of a rank's own rows in a decode step, in device memory at fixed addresses for CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata


@dataclass(frozen=True)
class DecodeRows:
    """One row for each of some requests, in host memory.

    Attributes:
        seq_lens: int32 `[num_rows]`, this row included.
        block_tables: per KV cache group, int32 `[num_rows, max_blocks]`, local ids.
        slots: per KV cache group, int64, where each row's key and value go, in the order in which those come; -1 is
            nowhere.
    """

    seq_lens: npt.NDArray[np.int32]
    block_tables: list[npt.NDArray[np.int32]]
    slots: list[npt.NDArray[np.int64]]


class OwnRows:
    """The own rows of one micro-batch come first; the others have no length and no slot, so that attention leaves them
    alone."""

    def __init__(self, max_rows: int, max_blocks: Sequence[int], device: torch.device) -> None:
        """Args:
        max_blocks: per KV cache group, blocks of the longest request.
        """
        self._starts = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self._starts_host = torch.arange(max_rows + 1, dtype=torch.int32)
        self._seq_lens = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._seq_lens_host = torch.zeros(max_rows, dtype=torch.int32)
        self._tables = [torch.zeros(max_rows, width, dtype=torch.int32, device=device) for width in max_blocks]
        self._slots = [torch.full((max_rows,), -1, dtype=torch.int64, device=device) for _ in max_blocks]

    def write(self, rows: DecodeRows, num_rows: int) -> None:
        """Enqueues the copies on the current stream.

        Args:
            num_rows: of the graph that will read them.
        """
        count = len(rows.seq_lens)
        seq_lens = np.zeros(num_rows, np.int32)
        seq_lens[:count] = rows.seq_lens
        self._seq_lens_host = torch.from_numpy(seq_lens)
        _copy(seq_lens, self._seq_lens[:num_rows])
        for group, (table, slots) in enumerate(zip(rows.block_tables, rows.slots, strict=True)):
            if count:
                _copy(table, self._tables[group][:count])
            padded = np.full(num_rows, -1, np.int64)
            padded[: len(slots)] = slots
            _copy(padded, self._slots[group][:num_rows])

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence written last, at least 1."""
        return max(1, int(self._seq_lens_host.max()))

    def metadata(self, group: int, num_rows: int, max_seq_len: int) -> CommonAttentionMetadata:
        """For a graph of `num_rows`; the tensors are views that keep their addresses."""
        return CommonAttentionMetadata(
            query_start_loc=self._starts[: num_rows + 1],
            query_start_loc_cpu=self._starts_host[: num_rows + 1],
            seq_lens=self._seq_lens[:num_rows],
            seq_lens_cpu_upper_bound=self._seq_lens_host[:num_rows],
            num_reqs=num_rows,
            num_actual_tokens=num_rows,
            max_query_len=1,
            max_seq_len=max_seq_len,
            block_table_tensor=self._tables[group][:num_rows],
            slot_mapping=self._slots[group][:num_rows],
            causal=True,
        )


def _copy(source: npt.NDArray[np.int32] | npt.NDArray[np.int64], target: torch.Tensor) -> None:
    host = torch.from_numpy(source)
    target.copy_(host.pin_memory() if target.is_cuda else host, non_blocking=True)
