from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kv_transfer.direct.pages import PageList
from kv_transfer.packed import wire as wire_module
from kv_transfer.packed.copier import HostCopier
from kv_transfer.packed.fp8 import HeadShape, UnfitError, round_trip
from kv_transfer.packed.messages import from_runs, to_runs
from kv_transfer.packed.wire import Compressed, Plain, Slot, Wire, slotfuls

LAYERS, BLOCKS = 3, 20
SHAPE = (BLOCKS, 4, 16, 64)


def caches(seed: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator).to(torch.bfloat16) for _ in range(LAYERS)]


def pages_of(layers: list[Any]) -> PageList:
    rows = [(block.data_ptr(), block.nbytes, 0) for layer in layers for block in layer]
    return PageList(rows)


def ids_of(blocks: list[int]) -> Any:
    return (np.arange(LAYERS)[:, None] * BLOCKS + np.array(blocks)).reshape(-1).astype(np.int32)


@pytest.mark.parametrize("is_compressed", [False, True])
@pytest.mark.parametrize("scratch_bytes", [1 << 20, 3 * 16 * 64 * 4 * 2])
def test_blocks_come_out_of_a_slot_where_they_belong_and_nothing_else_changes(
    monkeypatch: pytest.MonkeyPatch, is_compressed: bool, scratch_bytes: int
) -> None:
    monkeypatch.setattr(wire_module, "_SCRATCH_BYTES", scratch_bytes)
    theirs, ours = caches(1), caches(2)
    shape = HeadShape.of(theirs, values_follow=False)
    wire: Wire = Compressed(HostCopier(), shape) if is_compressed else Plain(HostCopier())
    source, destination = [3, 19, 4, 0, 11], [7, 1, 2, 18, 0]
    expected = [layer.clone() for layer in ours]
    for before, layer in zip(expected, theirs, strict=True):
        before[destination] = round_trip(layer[source], shape) if is_compressed else layer[source]
    source_ids, ids = ids_of(source), ids_of(destination)
    sizes = wire.sizes(pages_of(theirs).lengths[source_ids])
    slot = Slot(0, torch.full((int(sizes.sum()) + 64,), 0xAB, dtype=torch.uint8))
    wire.pack(pages_of(theirs), source_ids, slot).wait()
    assert (slot.data[-64:] == 0xAB).all(), "it takes as much as `sizes` says"
    wire.unpack(slot, pages_of(ours), ids).wait()
    assert all(layer.equal(before) for layer, before in zip(ours, expected, strict=True))


def test_pages_of_other_lengths_can_be_packed_but_not_compressed() -> None:
    data = torch.arange(64, dtype=torch.uint8)
    out = torch.zeros_like(data)
    lists = [PageList([(t.data_ptr(), 16, 0), (t.data_ptr() + 16, 48, 0)]) for t in (data, out)]
    slot = Slot(0, torch.zeros(64, dtype=torch.uint8))
    wire = Plain(HostCopier())
    ids = np.array([1, 0], dtype=np.int32)
    wire.pack(lists[0], ids, slot).wait()
    wire.unpack(slot, lists[1], ids).wait()
    assert out.equal(data)
    with pytest.raises(UnfitError, match="all alike"):
        HeadShape(4, 1, "bfloat16").check(lists[0].lengths)


def test_a_list_of_pages_is_cut_into_slotfuls_that_fit() -> None:
    sizes = np.array([4, 4, 4, 8, 1, 1, 8], dtype=np.int64)
    assert list(slotfuls(sizes, 9)) == [slice(0, 2), slice(2, 3), slice(3, 5), slice(5, 7)]
    assert list(slotfuls(sizes, 100)) == [slice(0, 7)]


@pytest.mark.parametrize(
    "rows",
    [
        [(1000 + 64 * i, 64) for i in range(10)],
        [(1000 + 64 * i, 64) for i in range(10)] + [(9000 + 128 * i, 32) for i in range(4)] + [(5, 7)],
        [(5, 7)],
        [(8, 8), (8, 16)],
        [(900 - 8 * i, 8) for i in range(3)] + [(0, 8), (100, 8), (50, 8)],
    ],
)
def test_a_list_of_pages_crosses_as_runs(rows: list[tuple[int, int]]) -> None:
    pages = PageList([(*row, 0) for row in rows])
    again = from_runs(to_runs(pages))
    assert again.addresses.tolist() == pages.addresses.tolist() and again.lengths.tolist() == pages.lengths.tolist()


def test_a_layer_is_one_run() -> None:
    rows = [(layer * 10**9 + block * 64, 64, 0) for layer in range(3) for block in range(1000)]
    assert len(to_runs(PageList(rows))) <= 2 * 3
