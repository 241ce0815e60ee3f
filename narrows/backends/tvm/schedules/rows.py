"""Kernels over rows, such as softmax and layer norm: everything of a row while it is near."""

from __future__ import annotations

from typing import Any

from narrows.backends.tvm.devices import Machine
from narrows.backends.tvm.schedules.loops import PARTITION, Kernel


def schedule_rows(kernel: Kernel, machine: Machine) -> None:
    """Schedule a kernel of statistics over rows."""
    schedule = kernel.schedule
    keep = [b for b in kernel.blocks if kernel.role(b)]
    last = kernel.inline(keep)
    for block in kernel.blocks[:-1]:
        if kernel.reductions(block):
            split_sum(kernel, block, machine)
    blocks = kernel.blocks[:-1]
    *rows, element = schedule.get_loops(last)
    if not rows:
        return
    row = kernel.parallel(rows)
    kernel.vectorize(element, machine.lanes_of(kernel.dtype(last)))
    for block in reversed(blocks):
        schedule.compute_at(block, row, preserve_unit_loops=True)
    for block in blocks:
        if not kernel.reductions(block):
            loop = schedule.get_loops(block)[-1]
            kernel.vectorize(loop, machine.lanes_of(kernel.dtype(block)))
        elif PARTIAL in kernel.block(block).annotations:
            vectorize_sum(kernel, block)


PARTIAL = "narrows.partial"


def split_sum(kernel: Kernel, block: Any, machine: Machine) -> None:
    """Have a block sum a row in as many partial sums as a vector holds."""
    schedule = kernel.schedule
    loop = schedule.get_loops(block)[-1]
    lanes = machine.lanes_of(kernel.dtype(block))
    size = kernel.extent(loop)
    if size < 2 * lanes or size % lanes:
        return
    _, lane = schedule.split(loop, [None, lanes])
    partial = schedule.rfactor(lane, len(kernel.extents(block)))
    schedule.annotate(partial, PARTIAL, 1)


def vectorize_sum(kernel: Kernel, block: Any) -> None:
    """Vectorize a block of partial sums, whose lanes are its last axis but not its last loop."""
    schedule = kernel.schedule
    axes = kernel.block(block).iter_vars
    # A block that was moved has a loop for each of its axes, in their order.
    loops = schedule.get_loops(block)[-len(axes) :]
    lane, step = loops[0], loops[-1]
    schedule.reorder(step, lane)
    schedule.annotate(step, PARTITION, 1)
    schedule.vectorize(lane)
    schedule.decompose_reduction(block, step)
