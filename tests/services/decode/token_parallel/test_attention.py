"""The wrapper round vLLM's CPU kernel: root and KV workers in one process, joined by a transport in memory, against the
unwrapped kernel with one cache."""

from __future__ import annotations

import pickle
import random
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.selector import _cached_get_attn_backend
from vllm.v1.kv_cache_interface import FullAttentionSpec

from services.decode.token_parallel.batch import Batch
from services.decode.token_parallel.context import TokenParallelContext, set_context
from services.decode.token_parallel.layers import describe_layers, make_layers, parameter_bytes
from services.decode.token_parallel.options import UnsupportedConfigurationError
from services.decode.token_parallel.plugin import register
from services.decode.token_parallel.rows import RowLayout
from tests.services.building import BLOCK_SIZE, MAX_MODEL_LEN, Stepper, request, scheduler, tiny_config
from tknp.common.partition import BlockPartition, RankPlace

HEADS, KV_HEADS, HEAD_SIZE = 8, 4, 32
NUM_BLOCKS = (14, 17, 12)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_backends() -> Iterator[None]:
    register()
    _cached_get_attn_backend.cache_clear()
    yield
    _cached_get_attn_backend.cache_clear()
    set_context(None)


def make_attention(config: Any, **kwargs: Any) -> Any:
    with set_current_vllm_config(config):
        return Attention(
            HEADS, HEAD_SIZE, HEAD_SIZE**-0.5, KV_HEADS, cache_config=config.cache_config, prefix="layers.0", **kwargs
        )


class Rank:
    """One layer with its cache and builder, and the batch as the rank sees it."""

    def __init__(self, config: Any, place: RankPlace) -> None:
        self.layer: Any = config.compilation_config.static_forward_context["layers.0"]
        self.layer.kv_cache = torch.zeros(place.num_blocks, KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
        spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=KV_HEADS, head_size=HEAD_SIZE, dtype=torch.float32)
        with set_current_vllm_config(config):
            self.builder = self.layer.attn_backend.get_builder_cls()(spec, ["layers.0"], config, CPU)
        self.batch = Batch(place, [BLOCK_SIZE], MAX_MODEL_LEN, CPU)

    def serve(self, packed: torch.Tensor) -> torch.Tensor:
        """A KV worker's part of a layer (kv_worker.py, _attend)."""
        mine = self.batch.scheduled_by_rank()[self.batch.place.rank]
        metadata = self.builder.build_rows(self.batch.attention_metadata(mine)[0])
        layout = RowLayout.of(self.layer)
        assert packed.shape == layout.empty_rows(metadata.num_actual_tokens, packed.dtype, CPU).shape
        output = layout.empty_output(len(packed), packed)
        self.layer.impl.attend_rows(self.layer, *layout.unpack(packed), metadata, output)
        return output


class Memory:
    """A Transport to KV workers in the same process."""

    def __init__(self, workers: Sequence[Rank]) -> None:
        self._workers = {worker.batch.place.rank: worker for worker in workers}
        self._answers: dict[int, torch.Tensor] = {}

    def start(self, sends: Any = (), recvs: Any = ()) -> Any:
        for packed, rank in sends:
            self._answers[rank] = self._workers[rank].serve(packed)
        return recvs

    def wait(self, handle: Any) -> None:
        for buffer, rank in handle:
            buffer.copy_(self._answers.pop(rank))


def kv_workers(config: Any, llama: Path, partition: BlockPartition) -> list[Rank]:
    """KV workers that were told about the root's layers, over the wire."""
    specs = pickle.loads(pickle.dumps(describe_layers(config)))
    workers = []
    for rank in range(1, partition.size):
        own = tiny_config(llama, partition.size)
        make_layers(own, specs, CPU)
        workers.append(Rank(own, RankPlace(rank, partition)))
    return workers


def token_rows(name: str, positions: range, heads: int, salt: int) -> torch.Tensor:
    generator = torch.Generator()
    rows = []
    for position in positions:
        generator.manual_seed(zlib.crc32(f"{name} {position} {heads} {salt}".encode()))
        rows.append(torch.randn(heads, HEAD_SIZE, generator=generator))
    return torch.stack(rows)


def reordered(metadata: Any, names: list[str], order: list[str], lens: dict[str, int]) -> CommonAttentionMetadata:
    """The batch in the model runner's order."""
    starts = torch.tensor([0, *[lens[n] for n in order]]).cumsum(0).to(torch.int32)
    rows = torch.tensor([names.index(n) for n in order])
    old = metadata.query_start_loc_cpu
    slots = torch.cat([metadata.slot_mapping[old[i] : old[i + 1]] for i in rows.tolist()])
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=metadata.seq_lens[rows],
        num_reqs=len(order),
        num_actual_tokens=metadata.num_actual_tokens,
        max_query_len=metadata.max_query_len,
        max_seq_len=metadata.max_seq_len,
        block_table_tensor=metadata.block_table_tensor[rows],
        slot_mapping=slots,
        causal=True,
    )


@pytest.mark.parametrize(
    "kwargs", [{}, {"per_layer_sliding_window": 48}, {"logits_soft_cap": 20.0}, {"alibi_slopes": [0.1] * HEADS}]
)
def test_split_attention_equals_the_kernel_on_one_cache(llama: Path, kwargs: dict[str, Any]) -> None:
    rng = random.Random(5)
    partition = BlockPartition(NUM_BLOCKS)
    plain = tiny_config(llama, 1)
    make_attention(plain, **kwargs)
    whole = Rank(plain, RankPlace(0, BlockPartition((partition.total,))))
    assert not hasattr(whole.layer.impl, "attend_rows"), "the reference must be vLLM's own"
    _cached_get_attn_backend.cache_clear()
    config = tiny_config(llama, partition.size)
    plan = scheduler(config, NUM_BLOCKS)
    make_attention(config, **kwargs)
    root = Rank(config, RankPlace(0, partition))
    workers = kv_workers(config, llama, partition)
    order: list[str] = []
    context = TokenParallelContext(0, partition.size, Memory(workers), root.batch, {"layers.0": 0}, lambda _: order)
    set_context(context)
    shares: set[tuple[bool, ...]] = set()

    def check(output: Any) -> None:
        for rank in (whole, root, *workers):
            rank.batch.update(output)
        lens = output.num_scheduled_tokens
        if not lens:
            return
        shares.add(tuple(bool(names) for names in root.batch.scheduled_by_rank()))
        names = list(lens)
        order[:] = rng.sample(names, len(names))
        common = reordered(whole.batch.attention_metadata(names)[0], names, order, lens)
        done = {n: plan.requests[n].num_computed_tokens for n in order}
        query, key, value = (
            torch.cat([token_rows(n, range(done[n] - lens[n], done[n]), heads, salt) for n in order])
            for heads, salt in ((HEADS, 0), (KV_HEADS, 1), (KV_HEADS, 2))
        )
        expected, got = torch.zeros_like(query), torch.zeros_like(query)
        reference = whole.layer
        reference.impl.do_kv_cache_update(reference, key, value, reference.kv_cache, common.slot_mapping)
        metadata = whole.builder.build(0, common)
        reference.impl.forward(reference, query, key, value, reference.kv_cache, metadata, expected)
        with context.live_step():
            metadata = root.builder.build(0, common)
            root.layer.impl.forward(root.layer, query, key, value, root.layer.kv_cache, metadata, got)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)

    stepper = Stepper(plan, check)
    for i in range(12):
        plan.add_request(request(f"r{i}", range(100 * i, 100 * i + 90), max_tokens=rng.randint(5, 90)))
    stepper.finish()
    assert (True, True, True) in shares
    assert any(not root_has for root_has, *_ in shares), "a step without rows on the root must be among them"
    # Nobody wrote into another rank's request: each cache holds what the whole one holds at the same place.
    for rank in (root, *workers):
        place = rank.batch.place
        part = whole.layer.kv_cache[place.base : place.base + place.num_blocks]
        torch.testing.assert_close(rank.layer.kv_cache, part)


def test_a_kv_worker_s_layer_is_made_like_the_root_s_and_holds_no_weights(llama: Path) -> None:
    config = tiny_config(llama, 2)
    layer = make_attention(config, per_layer_sliding_window=48, logits_soft_cap=20.0)
    layer._k_scale.fill_(0.5)
    layer._k_scale_float = 0.5
    (worker,) = kv_workers(config, llama, BlockPartition((4, 5)))
    made = worker.layer
    assert (made.sliding_window, made.impl.sliding_window, made.impl.logits_soft_cap) == (48, 48, 20.0)
    assert (float(made._k_scale), made._k_scale_float) == (0.5, 0.5)
    assert RowLayout.of(made) == RowLayout.of(layer)
    assert parameter_bytes([made]) < 100


def test_a_profiling_run_attends_to_nothing(llama: Path) -> None:
    config = tiny_config(llama, 2)
    layer = make_attention(config)
    output = torch.zeros(3, HEADS, HEAD_SIZE)
    rows = torch.ones(3, KV_HEADS, HEAD_SIZE)
    layer.impl.forward(layer, torch.ones_like(output), rows, rows, layer.kv_cache, None, output)
    assert not output.any()


@pytest.mark.parametrize("kwargs", [{"alibi_slopes": [0.1] * HEADS}, {"sinks": torch.zeros(HEADS)}])
def test_what_belongs_to_a_head_is_refused_where_heads_travel(llama: Path, kwargs: dict[str, Any]) -> None:
    config = tiny_config(llama, 2)
    set_context(TokenParallelContext(0, 2, Memory([]), is_spread=True))
    with pytest.raises(UnsupportedConfigurationError, match="ALiBi or attention sinks"):
        make_attention(config, **kwargs)


@pytest.mark.parametrize("is_spread", [False, True])
def test_a_warm_up_concerns_no_other_rank(llama: Path, is_spread: bool) -> None:
    config = tiny_config(llama, 2)
    # The memory would fail if it were asked for anything.
    set_context(TokenParallelContext(0, 2, Memory([]), is_spread=is_spread))
    make_attention(config)
    root = Rank(config, RankPlace(0, BlockPartition((4, 5))))
    assert root.layer.impl.num_heads == HEADS * (2 if is_spread else 1)
    starts = torch.tensor([0, 2], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([2], dtype=torch.int32),
        num_reqs=1,
        num_actual_tokens=2,
        max_query_len=2,
        max_seq_len=2,
        block_table_tensor=torch.tensor([[1]], dtype=torch.int32),
        slot_mapping=torch.tensor([32, 33]),
    )
    output = torch.zeros(2, HEADS, HEAD_SIZE)
    rows = torch.ones(2, KV_HEADS, HEAD_SIZE)
    root.layer.impl.forward(
        root.layer, torch.ones_like(output), rows, rows, root.layer.kv_cache, root.builder.build(0, common), output
    )
    torch.testing.assert_close(output, torch.ones_like(output))


def test_layers_with_a_cache_of_another_kind_are_refused(llama: Path) -> None:
    config = tiny_config(llama, 2)
    make_attention(config)

    class Recurrent:
        kv_cache = None

    config.compilation_config.static_forward_context["layers.1"] = Recurrent()
    with pytest.raises(RuntimeError, match=r"also has \['Recurrent'\]"):
        describe_layers(config)


def test_chunked_local_attention_is_refused(llama: Path) -> None:
    from vllm.model_executor.layers.attention import ChunkedLocalAttention

    config = tiny_config(llama, 2)
    with set_current_vllm_config(config):
        ChunkedLocalAttention(
            HEADS, HEAD_SIZE, 1.0, 64, num_kv_heads=KV_HEADS, cache_config=config.cache_config, prefix="layers.0"
        )
    with pytest.raises(RuntimeError, match="ChunkedLocalAttention"):
        describe_layers(config)
