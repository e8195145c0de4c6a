"""Triton kernels that write rows straight into another rank's memory and raise a flag there.

Flags are counters that only grow, so they are never reset: a rank waits until the flag has reached the number of the
layer that it needs, counted over all steps. Every kernel reads what changes from step to step (who owns which row,
the step's number) from device memory, so that it can be captured in a CUDA graph once.

Memory order follows PTX's model (section "Memory Consistency Model" of the PTX ISA): a program's stores come before its
barrier and its releasing increment of `arrived`; the last program to arrive acquires all of them and releases the
flags at system scope.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["buffer_offset", "flag_offset", "layer"])
def put_rows(
    query,
    key,
    value,
    query_stride,
    key_stride,
    value_stride,
    target_rank,
    target_row,
    buffers,
    buffer_offset,
    flags,
    flag_offset,
    arrived,
    step,
    layer,
    ROW_WIDTH: tl.constexpr,
    QUERY_WIDTH: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    FIRST_RANK: tl.constexpr,
    END_RANK: tl.constexpr,
    MAX_RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes rows `[query | key | value]` to their ranks, then raises the flags of `FIRST_RANK..END_RANK-1` at once.

    Args:
        target_rank, target_row: int64 `[num_rows]`; rank -1 is nobody.
        buffers, flags: int64 addresses by rank; the offsets are bytes.
        ROW_WIDTH: elements between rows at the target, a multiple of 64.
        arrived: int32 `[1]`, zero before and after.
        step: int64 `[1]`, layers counted before this step.
        MAX_RANKS: a power of two, at least the number of ranks.
    """
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rank = tl.load(target_rank + row)
    if rank >= 0:
        # The hints let it store 16 bytes at a time; an address alone says nothing about its alignment.
        address = tl.multiple_of(tl.load(buffers + rank) + buffer_offset, 16)
        start = tl.multiple_of(tl.load(target_row + row) * ROW_WIDTH, 64)
        target = tl.multiple_of(address.to(tl.pointer_type(query.dtype.element_ty)) + start, 16)
        row_values = tl.load(query + row * query_stride + columns, mask=columns < QUERY_WIDTH, other=0.0)
        if KEY_WIDTH > 0:
            in_key = (columns >= QUERY_WIDTH) & (columns < QUERY_WIDTH + KEY_WIDTH)
            keys = tl.load(key + row * key_stride + columns - QUERY_WIDTH, mask=in_key, other=0.0)
            row_values = tl.where(in_key, keys, row_values)
            in_value = (columns >= QUERY_WIDTH + KEY_WIDTH) & (columns < QUERY_WIDTH + KEY_WIDTH + VALUE_WIDTH)
            values = tl.load(value + row * value_stride + columns - QUERY_WIDTH - KEY_WIDTH, mask=in_value, other=0.0)
            row_values = tl.where(in_value, values, row_values)
        tl.store(target + columns, row_values, mask=columns < QUERY_WIDTH + KEY_WIDTH + VALUE_WIDTH)
    tl.debug_barrier()
    before = tl.atomic_add(arrived, 1, sem="acq_rel", scope="sys")
    if before == tl.num_programs(0) * tl.num_programs(1) - 1:
        tl.atomic_xchg(arrived, 0, sem="relaxed", scope="gpu")
        reached = tl.load(step) + layer + 1
        peers = tl.arange(0, MAX_RANKS)
        others = (peers >= FIRST_RANK) & (peers < END_RANK)
        raised = (tl.load(flags + peers, mask=others, other=0) + flag_offset).to(tl.pointer_type(tl.int64))
        tl.atomic_xchg(raised, reached + peers * 0, mask=others, sem="release", scope="sys")


@triton.jit(do_not_specialize=["layer"])
def wait_for_flags(flags, needed, layer, FIRST_RANK: tl.constexpr, END_RANK: tl.constexpr, MAX_RANKS: tl.constexpr):
    """One program that returns when this rank's flags have reached what is needed of each rank.

    Args:
        flags: int64 `[num_ranks]`, raised by others.
        needed: int64 `[num_ranks]`, layers counted before this step; very negative for a rank that sends nothing.
    """
    peers = tl.arange(0, MAX_RANKS)
    others = (peers >= FIRST_RANK) & (peers < END_RANK)
    reached = tl.load(needed + peers, mask=others, other=0) + layer + 1
    missing = tl.sum(others.to(tl.int32))
    while missing > 0:
        seen = tl.atomic_add(flags + peers, 0, mask=others, sem="acquire", scope="sys")
        missing = tl.sum((others & (seen < reached)).to(tl.int32))


@triton.jit
def take_rows(source, source_width, output, output_stride, target_rank, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Copies the rows that other ranks have written to `source` into `output`, which holds the own rows already."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if tl.load(target_rank + row) >= 0:
        values = tl.load(source + row * source_width + columns, mask=columns < WIDTH)
        tl.store(output + row * output_stride + columns, values, mask=columns < WIDTH)
