"""Wraps the attention backend that vLLM chose, so that the rows of a batch are attended to where their KV cache lives.

The wrapper is made of subclasses of the platform's own backend, builder and implementation, so that everything that
vLLM asks them still holds. On the root, rows of other ranks are sent to their owners and their outputs put back in
row order; on a KV worker the same subclasses attend to the rows that arrive. Where every rank runs the model, they
trade query heads and outputs (spread.py).
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backend import AttentionCGSupport

from services.decode.token_parallel.context import TokenParallelContext, get_context
from services.decode.token_parallel.graphs import CapturedMetadata
from services.decode.token_parallel.micro_batch import MAX_MICRO_BATCHES
from services.decode.token_parallel.options import UnsupportedConfigurationError
from services.decode.token_parallel.rows import RowLayout
from services.decode.token_parallel.splits import splitting
from services.decode.token_parallel.spread import attend_alone, attend_layer
from services.decode.token_parallel.step import RootStep

_ALIBI_SLOPES = 3
"""Their place among the arguments of vLLM's implementations after the number of heads."""


class NoLocalRows:
    """Stands for the metadata of a step in which the root owns no row: builders don't take zero requests."""


def wrap_backend(inner: type[Any], module: str) -> type[Any]:
    """A subclass of the attention backend `inner` that splits batches by owner.

    Args:
        module: where vLLM will look the class up again by its name (platforms/cuda.py turns it back into a path).
    """
    backend_builder = _wrap_builder(inner.get_builder_cls())
    backend_impl = _wrap_impl(inner.get_impl_cls(), updates_cache_in_forward=inner.forward_includes_kv_cache_update)

    class TokenParallelBackend(inner):
        # The layer then leaves writing the cache to our forward, which knows whose rows are whose
        # (model_executor/layers/attention/attention.py, Attention.forward).
        forward_includes_kv_cache_update = True

        @staticmethod
        def get_builder_cls() -> type[Any]:
            return backend_builder

        @staticmethod
        def get_impl_cls() -> type[Any]:
            return backend_impl

    TokenParallelBackend.__module__ = module
    TokenParallelBackend.__qualname__ = inner.get_name()
    return TokenParallelBackend


def _wrap_builder(inner: type[Any]) -> type[Any]:
    class TokenParallelBuilder(inner):
        # Ours differs per KV cache group, so one group's metadata cannot be patched into another's.
        supports_update_block_table = False

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            # Backends keep what a graph reads in buffers of the builder, so each micro-batch has one of its own.
            context = get_context()
            count = MAX_MICRO_BATCHES if context is not None and context.graphs is not None else 0
            self._of_micro_batch = [splitting(inner)(*args, **kwargs) for _ in range(count)]

        @classmethod
        def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
            # Only the exchange over symmetric memory can be captured by one process alone; prompts take another way.
            context = get_context()
            if context is None or context.graphs is None:
                return AttentionCGSupport.NEVER
            support = inner.get_cudagraph_support(vllm_config, kv_cache_spec)
            return min(support, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, key=lambda s: s.value)

        def build_captured(self, micro_batch: int, common_attn_metadata: Any) -> Any:
            """Metadata for the own rows of one micro-batch in a CUDA graph."""
            metadata = self._of_micro_batch[micro_batch].build(0, common_attn_metadata)
            metadata.token_parallel_slots = common_attn_metadata.slot_mapping
            return metadata

        def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
            context = get_context()
            assert context is not None and context.graphs is not None
            size = common_attn_metadata.num_actual_tokens
            parts = context.graphs.sizes.num_micro_batches(size)
            return self._build_graph([common_attn_metadata.max_seq_len] * parts, size // parts)

        def _build_graph(self, longest: list[int], rows_each: int) -> CapturedMetadata:
            context = get_context()
            assert context is not None and context.graphs is not None
            group = context.group_of_layer[self.layer_names[0]]
            return CapturedMetadata(
                [
                    self.build_captured(m, context.graphs.own_rows[m].metadata(group, rows_each, max_seq_len))
                    for m, max_seq_len in enumerate(longest)
                ]
            )

        def build_rows(self, common_attn_metadata: Any) -> Any:
            """Metadata for rows that are all this rank's own."""
            metadata = super().build(0, common_attn_metadata)
            metadata.token_parallel_slots = common_attn_metadata.slot_mapping
            return metadata

        def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
            context = get_context()
            if context is None or not context.live:
                return self.build_rows(common_attn_metadata)
            if context.graphs is not None and context.graphs.step is not None:
                longest = context.write_graph_inputs(common_attn_metadata)
                return self._build_graph(longest, context.graphs.step.rows_each)
            step = context.root_step(common_attn_metadata)
            group = context.group_of_layer[self.layer_names[0]]
            metadata: Any = self.build_rows(step.local_metadata[group]) if step.local_metadata else NoLocalRows()
            metadata.token_parallel_step = step
            return metadata

    return TokenParallelBuilder


def _wrap_impl(inner: type[Any], updates_cache_in_forward: bool) -> type[Any]:
    class TokenParallelImpl(inner):
        def __init__(self, num_heads: int, *args: Any, **kwargs: Any) -> None:
            context = get_context()
            shares = 1 if context is None else context.head_shares
            if shares > 1 and (args[_ALIBI_SLOPES] is not None or kwargs.get("sinks") is not None):
                raise UnsupportedConfigurationError(
                    "--token-parallel-weights spread does not take models with ALiBi or attention sinks, whose "
                    "parameters of each head would have to travel too; use --token-parallel-weights root"
                )
            # Of all workers whose query heads this one attends with; the layer around it has its own ones.
            super().__init__(num_heads * shares, *args, **kwargs)
            # KV workers make the same layer from these (layers.py).
            self.token_parallel_args = ((num_heads, *args), kwargs)

        def attend_rows(
            self,
            layer: Any,
            query: torch.Tensor,
            key: torch.Tensor | None,
            value: torch.Tensor | None,
            metadata: Any,
            output: torch.Tensor,
        ) -> None:
            """Writes the cache and attends, for rows that are all this rank's own.

            Args:
                query, output: `[num_rows, num_heads, head_size]`.
                key, value: `[num_rows, num_kv_heads, head_size]`; None for a layer that reads another layer's cache.
            """
            self.write_cache(layer, key, value, metadata)
            self.attend(layer, query, key, value, metadata, output)

        def write_cache(self, layer: Any, key: torch.Tensor | None, value: torch.Tensor | None, metadata: Any) -> None:
            """Keys and values of the rows that have a slot."""
            if not updates_cache_in_forward and self.kv_sharing_target_layer_name is None:
                self.do_kv_cache_update(layer, key, value, layer.kv_cache, metadata.token_parallel_slots)

        def attend(
            self,
            layer: Any,
            query: torch.Tensor,
            key: torch.Tensor | None,
            value: torch.Tensor | None,
            metadata: Any,
            output: torch.Tensor,
        ) -> None:
            """As `attend_rows`, to a cache that has been written."""
            super().forward(layer, query, key, value, layer.kv_cache, metadata, output)

        def forward(
            self,
            layer: Any,
            query: torch.Tensor,
            key: torch.Tensor | None,
            value: torch.Tensor | None,
            kv_cache: torch.Tensor,
            attn_metadata: Any,
            output: torch.Tensor,
            output_scale: torch.Tensor | None = None,
            output_block_scale: torch.Tensor | None = None,
        ) -> torch.Tensor:
            step = getattr(attn_metadata, "token_parallel_step", None)
            context = get_context()
            if attn_metadata is None:  # a profiling run, which attends to nothing
                super().forward(layer, query, key, value, kv_cache, None, output)
            elif isinstance(attn_metadata, CapturedMetadata):
                assert context is not None and context.graphs is not None
                context.graphs.exchange_and_attend(self, layer, (query, key, value), attn_metadata, output)
            elif step is None and context is not None and context.is_spread:
                attend_alone(self, layer, (query, key, value), attn_metadata, output)
            elif step is None:
                self.attend_rows(layer, query, key, value, attn_metadata, output)
            else:
                assert context is not None
                forward_layer = attend_layer if context.is_spread else _forward_by_owner
                forward_layer(self, context, step, layer, (query, key, value), attn_metadata, output)
            return output

        # Fused operations would write the whole batch into the root's cache.
        def fused_output_quant_supported(self, quant_key: Any) -> bool:
            return False

        def fused_rope_kvcache_supported(self) -> bool:
            return False

        def fused_qk_norm_rope_kvcache_supported(self) -> bool:
            return False

        def fused_qk_norm_mrope_kvcache_supported(self) -> bool:
            return False

    return TokenParallelImpl


def _forward_by_owner(
    impl: Any,
    context: TokenParallelContext,
    step: RootStep,
    layer: Any,
    qkv: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    metadata: Any,
    output: torch.Tensor,
) -> None:
    """The root's part of one layer: remote rows go out first, so that their owners work while the root attends to its
    own."""
    step.enter_layer(layer.layer_name)
    layout = RowLayout.of(layer)
    remote = [(rank, rows) for rank, rows in enumerate(step.rows) if rank and len(rows)]
    sending = context.transport.start(sends=[(layout.pack(*qkv, rows), rank) for rank, rows in remote])

    local = step.rows[0]
    if len(local):
        query, key, value = (None if t is None else t.index_select(0, local) for t in qkv)
        attended = output.new_empty((len(local), *output.shape[1:]))
        impl.attend_rows(layer, query, key, value, metadata, attended)
        output.index_copy_(0, local, attended)

    # Not before: on a GPU a receive holds up everything behind it on the stream.
    arriving = [(layout.empty_output(len(rows), output), rank) for rank, rows in remote]
    with context.clock.waiting():
        context.transport.wait(context.transport.start(recvs=arriving))
        context.transport.wait(sending)
    for (_, rows), (attended, _) in zip(remote, arriving, strict=True):
        output.index_copy_(0, rows, attended.view(len(rows), *output.shape[1:]))
