"""Kernels whose sums stay in registers: convolutions, matrix products, pooling, reductions.

A tile of the result, some positions by some vectors of channels, is summed up in registers while
the sum's loops run around it, and goes through the element-wise operators that follow before it is
written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from narrows.backends.tvm.devices import Machine
from narrows.backends.tvm.kernels import PADDING
from narrows.backends.tvm.schedules.elementwise import spread
from narrows.backends.tvm.schedules.loops import PARTITION, Kernel

CHANNELS, SPACE = "channels", "space"


def schedule_tiled(
    kernel: Kernel,
    main: Any,
    rows: int,
    vectors: int,
    outer: str,
    unrolled: bool,
    machine: Machine,
) -> None:
    """Schedule a kernel around its main block.

    Args:
        kernel: The kernel.
        main: The block that sums: ``[..., rows, channels]``, channels last.
        rows: Rows of a tile.
        vectors: Vectors of channels of a tile.
        outer: Whether loops over ``channels`` or over ``space`` are outside.
        unrolled: Whether the sum's own loops are unrolled, too.
        machine: What it is made for.
    """
    schedule = kernel.schedule
    last = kernel.inline([main])
    padding = kernel.with_role(PADDING)
    if schedule.get(last).name_hint == schedule.get(main).name_hint:
        last = schedule.cache_write(main, 0, "local")
    elif kernel.extents(last) != kernel.extents(main):
        spread(kernel, last, machine)  # a result that is broadcast is used in a loop of its own
        last = schedule.cache_write(main, 0, "local")
    lanes = min(machine.lanes_of(kernel.dtype(main)), kernel.extents(main)[-1])
    *lead, row, channel = schedule.get_loops(last)[-len(kernel.extents(main)) :]
    size, width = kernel.extent(row), kernel.extent(channel)
    block, vector, lane = schedule.split(channel, [None, vectors, lanes])
    tile, position = schedule.split(row, [None, min(rows, size)])
    if size % min(rows, size):
        schedule.annotate(tile, PARTITION, 1)
    ragged = width % (lanes * vectors) != 0
    if ragged:
        schedule.annotate(block, PARTITION, 1)
    if outer == CHANNELS:
        schedule.reorder(block, *lead, tile, position, vector, lane)
        # A loop with a remainder is not fused, or the remainder could not be told apart.
        kernel.parallel(lead if ragged and lead else [block, *lead])
        at = tile
    else:
        schedule.reorder(*lead, tile, block, position, vector, lane)
        kernel.parallel(lead or [tile])
        at = block
    schedule.compute_at(main, at, preserve_unit_loops=True)
    schedule.set_scope(main, 0, "local")
    sums = len(kernel.reductions(main))
    loops = schedule.get_loops(main)
    around = loops[len(loops) - sums :]
    position_, channel_ = loops[len(loops) - sums - 2 : len(loops) - sums]
    vector_, lane_ = schedule.split(channel_, [None, lanes])
    schedule.reorder(*around, position_, vector_, lane_)
    for loop in (position, vector, position_, vector_, *(around if unrolled else ())):
        schedule.unroll(loop)
    for loop in (lane, lane_):
        schedule.vectorize(loop)
    schedule.decompose_reduction(main, around[0])
    if padding is not None:
        spread(kernel, padding, machine)


def schedule_reduction(kernel: Kernel, machine: Machine) -> None:
    """Schedule a kernel that reduces axes, with element-wise operators before and behind it."""
    schedule = kernel.schedule
    sums = [b for b in kernel.blocks if kernel.reductions(b)]
    last = kernel.inline(sums)
    if len(sums) > 1:
        return
    main = sums[0]
    if kernel.reductions(main) and _along_rows(kernel, main):
        _fold_rows(kernel, main, last, machine)
        return
    if schedule.get(last).name_hint != schedule.get(main).name_hint:
        spread(kernel, last, machine)
    count = len(kernel.reductions(main))
    loops = schedule.get_loops(main)
    *lead, channel = loops[: len(loops) - count]
    block, lane = kernel.vectorize(channel, machine.lanes_of(kernel.dtype(main)))
    around = loops[len(loops) - count :]
    schedule.reorder(*lead, block, *around, lane)
    schedule.decompose_reduction(main, around[0])


def _along_rows(kernel: Kernel, main: Any) -> bool:
    """Whether the operand's last axis is reduced, or nothing else is left to vectorize."""
    block = kernel.block(main)
    spatial = [v for v in block.iter_vars if v.iter_type != 2]
    if not spatial or int(spatial[-1].dom.extent) == 1:
        return True
    reads: Sequence[Any] = block.reads
    index = reads[0].region[-1].min if len(reads) and len(reads[0].region) else None
    return index is None or not index.same_as(spatial[-1].var)


def _fold_rows(kernel: Kernel, main: Any, last: Any, machine: Machine) -> None:
    """Sum a row in as many partial sums as a vector holds."""
    schedule = kernel.schedule
    alone = schedule.get(last).name_hint == schedule.get(main).name_hint
    if not alone:
        spread(kernel, last, machine)
    loops = schedule.get_loops(main)
    inner = loops[-1]
    lanes = machine.lanes_of(kernel.dtype(main))
    if kernel.extent(inner) % lanes:
        return
    _, lane = schedule.split(inner, [None, lanes])
    partial = schedule.rfactor(lane, len(kernel.extents(main)))
    loops = schedule.get_loops(partial)
    sums = len(kernel.reductions(partial))
    spatial = [b for b in loops if b is not None][: len(loops)]
    del spatial
    order = _loops_of(kernel, partial)
    schedule.reorder(*order[0], *order[1], order[2])
    schedule.vectorize(order[2])
    assert sums
    schedule.decompose_reduction(partial, order[1][0])


def _loops_of(kernel: Kernel, partial: Any) -> tuple[list[Any], list[Any], Any]:
    """Return the loops of a partial sum: over rows, over the sum, over the lanes."""
    loops = kernel.schedule.get_loops(partial)
    lane = loops[-1]
    count = len(kernel.reductions(partial))
    rest = loops[:-1]
    return rest[: len(rest) - count], rest[len(rest) - count :], lane
