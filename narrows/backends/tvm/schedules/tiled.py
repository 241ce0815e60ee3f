"""Kernels whose sums stay in registers: convolutions, matrix products, pooling, reductions.

A tile of the result, some positions by some vectors of channels, is summed up in registers while
the sum's loops run around it, and goes through the element-wise operators that follow before it is
written.
"""

from __future__ import annotations

from typing import Any

from narrows.backends.tvm.devices import Machine
from narrows.backends.tvm.kernels import COLUMNS, DOT, PADDING
from narrows.backends.tvm.kernels.dots import QUAD
from narrows.backends.tvm.schedules import dots
from narrows.backends.tvm.schedules.elementwise import spread
from narrows.backends.tvm.schedules.loops import PARTITION, REDUCTION, Kernel

CHANNELS, SPACE = "channels", "space"

# Rows of the result for which a filter per channel pads its operand at once. Fewer pad the rows
# between two strips more often than it saves to have them near.
FEWEST_ROWS, MOST_ROWS = 4, 14


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
    columns = kernel.with_role(COLUMNS)
    kept = [main] if columns is None else [main, columns]
    before = _codes_before(kernel, main)
    last = kernel.inline([*kept, *before])
    for block in before:
        spread(kernel, block, machine)
    padding = kernel.with_role(PADDING)
    if kernel.same(last, main):
        last = schedule.cache_write(main, 0, "local")
    elif not kernel.follows(last, main):
        spread(kernel, last, machine)  # a result that is broadcast is used in a loop of its own
        last = schedule.cache_write(main, 0, "local")
    instruction = _instruction(kernel, main, machine)
    lanes = min(machine.lanes_of(kernel.dtype(main)), kernel.extents(main)[-1])
    *lead, row, channel = schedule.get_loops(last)[-len(kernel.extents(main)) :]
    size, width = kernel.extent(row), kernel.extent(channel)
    ragged = width % (lanes * vectors) != 0
    strip = _strip(kernel, main) if unrolled and padding is not None and not ragged else 0
    lead, inside = (lead, []) if not strip else _split_last(kernel, lead, strip)
    block, vector, lane = schedule.split(channel, [None, vectors, lanes])
    tile, position = schedule.split(row, [None, min(rows, size)])
    if size % min(rows, size):
        schedule.annotate(tile, PARTITION, 1)
    if ragged:
        schedule.annotate(block, PARTITION, 1)
    if outer == CHANNELS:
        schedule.reorder(block, *lead, *inside, tile, position, vector, lane)
        # A loop with a remainder is not fused, or the remainder could not be told apart.
        whole = kernel.parallel(lead if ragged and lead else [block, *lead])
        at = tile
    else:
        schedule.reorder(*lead, *inside, tile, block, position, vector, lane)
        whole = kernel.parallel(lead or [tile])
        at = block
    schedule.compute_at(main, at, preserve_unit_loops=True)
    schedule.set_scope(main, 0, "local")
    if columns is not None:
        _keep_columns(kernel, columns, at, lanes)
    sums = len(kernel.reductions(main))
    loops = schedule.get_loops(main)
    around = loops[len(loops) - sums :]
    position_, channel_ = loops[len(loops) - sums - 2 : len(loops) - sums]
    vector_, lane_ = schedule.split(channel_, [None, lanes])
    # A dot product by fours takes the innermost loop of the sum with the lanes.
    quad = [around.pop()] if instruction and kernel.role(main) == DOT else []
    schedule.reorder(*around, position_, vector_, lane_, *quad)
    for loop in (position, vector, position_, vector_, *(around if unrolled else ())):
        schedule.unroll(loop)
    schedule.vectorize(lane)
    if not instruction:
        schedule.vectorize(lane_)
    start = schedule.decompose_reduction(main, around[0])
    if instruction:
        schedule.vectorize(schedule.get_loops(start)[-1])
        schedule.tensorize(lane_, instruction)
    if padding is not None:
        _pad(kernel, padding, whole if strip else None, machine)


def _pad(kernel: Kernel, padding: Any, at: Any, machine: Machine) -> None:
    """Schedule the padding of an operand: inside a loop, or before all of them."""
    if at is None:
        spread(kernel, padding, machine)
        return
    kernel.schedule.compute_at(padding, at, preserve_unit_loops=True)
    channel = kernel.schedule.get_loops(padding)[-1]
    kernel.vectorize(channel, machine.lanes_of(kernel.dtype(padding)))


def _split_last(kernel: Kernel, loops: list[Any], size: int) -> tuple[list[Any], list[Any]]:
    """Return the loops around strips of ``size``, and the one inside."""
    *lead, last = loops
    around, inside = kernel.schedule.split(last, [None, size])
    return [*lead, around], [inside]


def _strip(kernel: Kernel, main: Any) -> int:
    """Return for how many rows of an image an operand is padded at once; 0 for all of them."""
    if len(kernel.extents(main)) != 4:
        return 0
    height = kernel.extents(main)[1]
    rows = max(r for r in range(1, MOST_ROWS + 1) if height % r == 0)
    return rows if rows >= min(FEWEST_ROWS, height) else 0


def _codes_before(kernel: Kernel, main: Any) -> list[Any]:
    """Return the element-wise blocks that a sum of codes reads.

    They are computed once: a test in the innermost loop, as padding has one, would take apart the
    vectors of bytes.
    """
    if kernel.dtype(main) != "int32":
        return []
    blocks = kernel.blocks
    place = next(i for i, block in enumerate(blocks) if kernel.same(block, main))
    return [b for b in blocks[:place] if not kernel.role(b) and not kernel.reductions(b)]


def _instruction(kernel: Kernel, main: Any, machine: Machine) -> str:
    """Return TVM's name of the dot product that computes a block, if one does."""
    if not machine.dot:
        return ""
    if kernel.with_role(COLUMNS) is not None:
        return dots.lanes(machine.dot)
    whole = kernel.role(main) == DOT and kernel.reductions(main)[-1] == QUAD
    return dots.broadcast(machine.dot) if whole else ""


def _keep_columns(kernel: Kernel, columns: Any, at: Any, lanes: int) -> None:
    """Pack the columns that a tile reads, into registers."""
    schedule = kernel.schedule
    schedule.compute_at(columns, at, preserve_unit_loops=True)
    schedule.set_scope(columns, 0, "local")
    *loops, channel = schedule.get_loops(columns)[-len(kernel.extents(columns)) :]
    vector, lane = schedule.split(channel, [None, lanes])
    for loop in (*loops, vector):
        schedule.unroll(loop)
    schedule.vectorize(lane)


def schedule_reduction(kernel: Kernel, machine: Machine) -> None:
    """Schedule a kernel that reduces axes, with element-wise operators before and behind it."""
    schedule = kernel.schedule
    sums = [b for b in kernel.blocks if kernel.reductions(b)]
    last = kernel.inline(sums)
    if len(sums) > 1:  # such as an index beside a maximum: rare, and left as it is
        return
    (main,) = sums
    if not kernel.same(last, main):
        spread(kernel, last, machine)
    if _along_rows(kernel, main):
        _fold_rows(kernel, main, machine)
        return
    count = len(kernel.reductions(main))
    loops = schedule.get_loops(main)
    *lead, channel = loops[: len(loops) - count]
    block, lane = kernel.vectorize(channel, machine.lanes_of(kernel.dtype(main)))
    around = loops[len(loops) - count :]
    schedule.reorder(*lead, block, *around, lane)
    schedule.decompose_reduction(main, around[0])


def _along_rows(kernel: Kernel, main: Any) -> bool:
    """Whether a block reduces the last axis of what it reads."""
    block = kernel.block(main)
    spatial = [axis for axis in block.iter_vars if axis.iter_type != REDUCTION]
    if not spatial or int(spatial[-1].dom.extent) == 1:
        return True
    return not block.reads[0].region[-1].min.same_as(spatial[-1].var)


def _fold_rows(kernel: Kernel, main: Any, machine: Machine) -> None:
    """Sum rows in as many partial sums as a vector holds, where that comes out even."""
    schedule = kernel.schedule
    lanes = machine.lanes_of(kernel.dtype(main))
    row = schedule.get_loops(main)[-1]
    if kernel.extent(row) % lanes:
        return
    _, lane = schedule.split(row, [None, lanes])
    partial = schedule.rfactor(lane, len(kernel.extents(main)))
    *loops, lane = schedule.get_loops(partial)
    around = loops[len(loops) - len(kernel.reductions(partial)) :]
    schedule.vectorize(lane)
    schedule.decompose_reduction(partial, around[0])
