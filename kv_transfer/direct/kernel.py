"""Copies pages between two lists of addresses, with Triton; see launch.py."""

from __future__ import annotations

import triton
import triton.language as tl

WORD_BYTES = 4

_VECTOR_WORDS = tl.constexpr(4)  # 16 bytes, what one thread reads at once

_POINTERS = ["sources", "destinations", "ids"]
_COUNTS = ["num_regions", "num_blocks", "page_vectors", "tiles_per_page"]


@triton.jit
def _pointer(table, ids, region, block):  # type: ignore[no-untyped-def]
    pointer = tl.load(table + tl.load(ids + region) + tl.load(ids + block)).to(tl.pointer_type(tl.int32))
    return tl.multiple_of(pointer, 16)


# One build for all arguments: another one must not be compiled in the middle of serving.
@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=_POINTERS)  # type: ignore[untyped-decorator]
def copy_pages_kernel(  # type: ignore[no-untyped-def]
    sources,
    destinations,
    ids,
    num_regions,
    num_blocks,
    page_vectors,
    tiles_per_page,
    TILE_WORDS: tl.constexpr,
):
    """As copy_pages of bulk.cu; the programs share the tiles that the pages are cut into."""
    destination_ids = ids + num_regions + num_blocks
    for tile in range(tl.program_id(0), num_regions * num_blocks * tiles_per_page, tl.num_programs(0)):
        page = tile // tiles_per_page
        region, block = page // num_blocks, num_regions + page % num_blocks
        source = _pointer(sources, ids, region, block)
        destination = _pointer(destinations, destination_ids, region, block)
        words = (tile % tiles_per_page) * TILE_WORDS + tl.arange(0, TILE_WORDS)
        inside = words < page_vectors * _VECTOR_WORDS
        tl.store(destination + words, tl.load(source + words, mask=inside), mask=inside)
