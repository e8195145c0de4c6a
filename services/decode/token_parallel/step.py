"""One step of a worker that runs the model: which rows of the batch belong to which rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from services.decode.token_parallel.batch import Batch


@dataclass(frozen=True)
class RootStep:
    """Shared by all layers of a step.

    Attributes:
        rows: for each rank the row numbers of the batch that it owns, int64 `[num_rows_of_rank]`, in the order in which
            both sides expect them.
        local_metadata: per KV cache group, the metadata of this rank's own rows; empty if it has none in this step.
    """

    rows: list[torch.Tensor]
    local_metadata: list[Any]
    _layer_names: Iterator[str]

    @classmethod
    def plan(
        cls, batch: Batch, row_request_ids: Sequence[str], common_attn_metadata: Any, layer_names: Iterator[str]
    ) -> RootStep:
        """Args:
        row_request_ids: the request of each entry of the batch, in the model runner's order.
        common_attn_metadata: of which only the host copy of `query_start_loc`, int32 `[num_requests + 1]`, is read.
        layer_names: the attention layers in the order in which KV workers go through them.
        """
        starts = common_attn_metadata.query_start_loc_cpu.numpy()
        place_in_batch = {request_id: i for i, request_id in enumerate(row_request_ids)}
        by_rank = batch.scheduled_by_rank()
        rows = []
        for request_ids in by_rank:
            spans = [np.arange(starts[i], starts[i + 1]) for i in map(place_in_batch.__getitem__, request_ids)]
            rows.append(batch.to_index(np.concatenate(spans).astype(np.int64) if spans else np.zeros(0, np.int64)))
        own = by_rank[batch.place.rank]
        local_metadata = batch.attention_metadata(own) if own else []
        return cls(rows, local_metadata, layer_names)

    def enter_layer(self, name: str) -> None:
        """Called before a layer's rows are exchanged.

        Raises:
            RuntimeError: KV workers, who go through the layers in the order of their registration, are at another
                layer.
        """
        expected = next(self._layer_names, None)
        if name != expected:
            raise RuntimeError(
                f"the model runs attention layer {name} where the KV workers expect {expected}; "
                "token parallelism needs a model that runs its attention layers in the order of their registration"
            )
