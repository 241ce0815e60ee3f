"""Kernels over rows, such as softmax and layer norm: everything of a row while it is near."""

from __future__ import annotations

from typing import Any

from narrows.backends.tvm.devices import Machine
from narrows.backends.tvm.schedules.loops import Kernel


def schedule_rows(kernel: Kernel, machine: Machine) -> None:
    """Schedule a kernel of statistics over rows."""
    schedule = kernel.schedule
    keep = [b for b in kernel.blocks if kernel.role(b)]
    last = kernel.inline(keep)
    blocks = kernel.blocks[:-1]
    *rows, element = schedule.get_loops(last)
    if not rows:
        return
    row = kernel.parallel(rows)
    kernel.vectorize(element, machine.lanes_of(kernel.dtype(last)))
    for block in reversed(blocks):
        schedule.compute_at(block, row, preserve_unit_loops=True)
    for block in blocks:
        _vectorize(kernel, block, machine)


def _vectorize(kernel: Kernel, block: Any, machine: Machine) -> None:
    loop = kernel.schedule.get_loops(block)[-1]
    lanes = machine.lanes_of(kernel.dtype(block))
    if not kernel.reductions(block):
        kernel.vectorize(loop, lanes)
