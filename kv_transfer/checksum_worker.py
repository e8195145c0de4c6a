"""The workers' half of the test mode of kv_transfer.checksums: which blocks were paired with which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kv_transfer import checksums
from kv_transfer.identity import Offer
from kv_transfer.shapes import ShapeCheckingWorker


class ChecksumWorker(ShapeCheckingWorker):
    """vLLM's pull worker with the tables of the test mode, where it is on."""

    _sum_table: checksums.ChecksumTable | None = None
    _sum_reader: checksums.ChecksumReader | None = None

    def _prepare_checksums(
        self, kv_caches: Any, on_compared: Callable[[int], None]
    ) -> tuple[checksums.ChecksumTable, checksums.ChecksumReader]:
        """Both sides' parts; `on_compared` as ChecksumReader has it.

        Raises:
            NotImplementedError: the KV cache is not of the kind that the test mode knows.
        """
        is_plain = all(cache.ndim == 4 and cache.is_contiguous() for cache in kv_caches.values())
        is_whole = self._physical_blocks_per_logical_kv_block == 1 and self.dcp_size == 1
        if not (is_plain and is_whole) or self.use_mla or self._has_mamba:
            raise NotImplementedError(
                f"{checksums.VARIABLE} knows plain attention with whole blocks only; leave it unset for this model"
            )
        groups = [[kv_caches[name] for name in sorted(g.layer_names)] for g in self.kv_cache_config.transfer_groups]
        self._sum_table = checksums.ChecksumTable(groups)
        num_rows = self.model_config.max_model_len // checksums.SMALLEST_BLOCK + 1
        self._sum_reader = checksums.ChecksumReader(
            *(self.nixl_wrapper, groups, self._first_head(self.tp_rank, self.world_size), num_rows),
            on_compared=on_compared,
        )
        return self._sum_table, self._sum_reader

    def _first_head(self, rank: int, tensor_parallel_size: int) -> int:
        return int(rank * self.model_config.get_total_num_kv_heads() // tensor_parallel_size)

    def _expect_checksums(self, request_id: str, read_spec: Any, offer: Offer, engine_id: str) -> None:
        assert self._sum_reader is not None and self.transfer_topo is not None
        worker = (0, read_spec.remote_rank)
        remote = self.transfer_topo.get_engine_info(engine_id)
        here, there = read_spec.local_block_ids, read_spec.remote_block_ids
        # As `_read_blocks` of vLLM pairs them.
        ratio = self.transfer_topo.block_size_ratio(remote.remote_block_size)
        if ratio > 1:
            here, there = self._map_block_ids_for_block_size_ratio(here, there, ratio)
        here, there = self._apply_prefix_caching(
            decode_block_ids=here,
            prefill_block_ids=there,
            decode_physical_per_logical=self._physical_blocks_per_logical_kv_block,
            prefill_physical_per_logical=remote.remote_physical_blocks_per_logical,
        )
        table = offer.tables[worker]
        first_head = self._first_head(read_spec.remote_rank, remote.remote_tp_size)
        pulled = checksums.PulledBlocks(
            self._remote_agents[engine_id][worker],
            table.checksums,
            table.num_heads,
            first_head,
            remote.remote_block_size,
            here,
            there,
            offer.row_of(worker),
        )
        self._sum_reader.expect(request_id, pulled)
