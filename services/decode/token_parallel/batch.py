"""The live requests of an engine as one rank sees them, replayed from the SchedulerOutputs that every worker receives.

Nothing is shipped between ranks and nothing is read back from a device to know who owns a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from services.decode.token_parallel.own_rows import DecodeRows
from tknp.common.partition import RankPlace


class Batch:
    """Owner and progress of every live request, and the block tables of this rank's own."""

    def __init__(self, place: RankPlace, block_sizes: Sequence[int], max_model_len: int, device: torch.device) -> None:
        """Args:
        block_sizes: tokens per block of each KV cache group.
        max_model_len: tokens of the longest request.
        """
        self.place = place
        self._block_sizes = tuple(block_sizes)
        self.max_blocks = max_blocks(block_sizes, max_model_len)
        self._device = device
        self._owner: dict[str, int] = {}
        self._num_computed: dict[str, int] = {}
        self._tables: dict[str, list[npt.NDArray[np.int32]]] = {}
        self._num_blocks: dict[str, list[int]] = {}
        self.num_scheduled_tokens: dict[str, int] = {}
        self.ever_owned: set[int] = set()
        """Local ids of all blocks that this rank's requests were ever given."""

    def update(self, scheduler_output: Any) -> None:
        """Takes over one `SchedulerOutput`."""
        for request_id in scheduler_output.finished_req_ids:
            self._remove(request_id)
        for request_id in scheduler_output.preempted_req_ids or ():
            self._remove(request_id)
        for new in scheduler_output.scheduled_new_reqs:
            self._place_request(new.req_id, new.block_ids)
            self._num_computed[new.req_id] = new.num_computed_tokens
        cached = scheduler_output.scheduled_cached_reqs
        for request_id, block_ids, num_computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if request_id in cached.resumed_req_ids:
                # A preempted request may come back on another rank.
                self._place_request(request_id, block_ids)
            elif block_ids is not None and request_id in self._tables:
                self._append(request_id, block_ids)
            self._num_computed[request_id] = num_computed
        self.num_scheduled_tokens = scheduler_output.num_scheduled_tokens

    def scheduled_by_rank(self) -> list[list[str]]:
        """The scheduled requests of each rank, in the order in which their rows travel."""
        requests: list[list[str]] = [[] for _ in range(self.place.partition.size)]
        for request_id in self.num_scheduled_tokens:
            requests[self._owner[request_id]].append(request_id)
        return requests

    def attention_metadata(self, request_ids: Sequence[str]) -> list[CommonAttentionMetadata]:
        """What each KV cache group's builder needs to attend to the rows of this rank's own `request_ids`, in that
        order.

        The rows of one request are adjacent; `query_start_loc` is int32 `[num_requests + 1]`, `seq_lens` int32
        `[num_requests]`, `slot_mapping` int64 `[num_rows]`, all ids local to this rank.
        """
        count = len(request_ids)
        query_lens = np.fromiter((self.num_scheduled_tokens[r] for r in request_ids), np.int32, count)
        computed = np.fromiter((self._num_computed[r] for r in request_ids), np.int32, count)
        seq_lens = computed + query_lens
        query_start = np.zeros(count + 1, np.int32)
        np.cumsum(query_lens, out=query_start[1:])
        num_rows = int(query_start[-1])
        request_of_row = np.repeat(np.arange(count), query_lens)
        positions = np.arange(num_rows) - query_start[request_of_row] + computed[request_of_row]

        query_start_device, seq_lens_device = self._to_device(query_start), self._to_device(seq_lens)
        metadata = []
        for group, block_size in enumerate(self._block_sizes):
            table = np.stack([self._tables[r][group] for r in request_ids])
            slots = (
                table[request_of_row, positions // block_size].astype(np.int64) * block_size + positions % block_size
            )
            metadata.append(
                CommonAttentionMetadata(
                    query_start_loc=query_start_device,
                    query_start_loc_cpu=torch.from_numpy(query_start),
                    seq_lens=seq_lens_device,
                    seq_lens_cpu_upper_bound=torch.from_numpy(seq_lens),
                    num_reqs=count,
                    num_actual_tokens=num_rows,
                    max_query_len=int(query_lens.max()),
                    max_seq_len=int(seq_lens.max()),
                    block_table_tensor=self._to_device(table),
                    slot_mapping=self._to_device(slots),
                    causal=True,
                )
            )
        return metadata

    def is_decode(self) -> bool:
        """Whether vLLM's model runner takes the scheduled step for a decode of one token per request: a prompt's last
        token counts as one, unless it is the only one (worker/gpu/model_runner.py, gather_batch_req_state)."""
        scheduled = self.num_scheduled_tokens
        return all(n == 1 for n in scheduled.values()) and all(self._num_computed[r] for r in scheduled)

    def blocks_by_rank(self) -> list[int]:
        """Of the first KV cache group, that each rank attends to in a scheduled decode step."""
        blocks, size = [0] * self.place.partition.size, self._block_sizes[0]
        for request_id in self.num_scheduled_tokens:
            blocks[self._owner[request_id]] += self._num_computed[request_id] // size + 1
        return blocks

    def decode_rows(self, request_ids: Sequence[str]) -> DecodeRows:
        """One row for each of this rank's own `request_ids`, all in a decode step."""
        count = len(request_ids)
        computed = np.fromiter((self._num_computed[r] for r in request_ids), np.int64, count)
        tables, slots = [], []
        for group, block_size in enumerate(self._block_sizes):
            table = np.zeros((count, self.max_blocks[group]), np.int32)
            for row, request_id in enumerate(request_ids):
                table[row] = self._tables[request_id][group]
            tables.append(table)
            slots.append(table[np.arange(count), computed // block_size] * np.int64(block_size) + computed % block_size)
        return DecodeRows((computed + 1).astype(np.int32), tables, slots)

    def any_rows(self, count: int, num_blocks: int, first: int) -> DecodeRows:
        """Rows of nobody, each over `num_blocks` blocks of its own, that write nothing: for measuring."""
        tables = [np.zeros((count, width), np.int32) for width in self.max_blocks]
        blocks = (np.arange(count)[:, None] + first) * num_blocks + np.arange(num_blocks) + 1
        for table in tables:
            width = min(num_blocks, table.shape[1])
            table[:, :width] = (blocks % self.place.num_blocks)[:, :width]
        seq_lens = np.full(count, num_blocks * self._block_sizes[0], np.int32)
        return DecodeRows(seq_lens, tables, [np.full(count, -1, np.int64) for _ in tables])

    def to_index(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """Row numbers as an index tensor on this rank's device."""
        return self._to_device(rows)

    def _place_request(self, request_id: str, block_ids: Sequence[Sequence[int]]) -> None:
        self._remove(request_id)
        # A rank's null block lies in its own range too, so that any id tells the owner.
        first = next(ids[0] for ids in block_ids if ids)
        owner = self._owner[request_id] = self.place.partition.rank_of(first)
        if owner == self.place.rank:
            self._tables[request_id] = [np.zeros(width, np.int32) for width in self.max_blocks]
            self._num_blocks[request_id] = [0] * len(self._block_sizes)
            self._append(request_id, block_ids)

    def _append(self, request_id: str, block_ids: Sequence[Sequence[int]]) -> None:
        counts = self._num_blocks[request_id]
        for group, ids in enumerate(block_ids):
            end = counts[group] + len(ids)
            local = [block_id - self.place.base for block_id in ids]
            self._tables[request_id][group][counts[group] : end] = local
            self.ever_owned.update(local)
            counts[group] = end

    def _remove(self, request_id: str) -> None:
        for state in (self._owner, self._num_computed, self._tables, self._num_blocks):
            state.pop(request_id, None)

    def _to_device(self, array: npt.NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cpu":
            return tensor
        # A fresh pinned buffer each step: under async scheduling the host runs ahead of the copy.
        return tensor.pin_memory().to(self._device, non_blocking=True)


def max_blocks(block_sizes: Sequence[int], max_model_len: int) -> tuple[int, ...]:
    """Per KV cache group, the width of a block table."""
    return tuple(-(-max_model_len // size) + 1 for size in block_sizes)
