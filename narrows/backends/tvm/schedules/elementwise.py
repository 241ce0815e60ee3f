"""Kernels without sums: one loop nest, the last axis in vectors, the others on all cores."""

from __future__ import annotations

from typing import Any

from narrows.backends.tvm.devices import Machine
from narrows.backends.tvm.kernels import LANES
from narrows.backends.tvm.schedules.loops import Kernel


def schedule_elementwise(kernel: Kernel, machine: Machine) -> None:
    """Schedule a kernel that computes every element on its own."""
    lanes = [int(kernel.block(b).annotations.get(LANES, 0)) for b in kernel.blocks]
    last = kernel.inline(())
    spread(kernel, last, machine, min(filter(None, lanes), default=0))


def spread(kernel: Kernel, block: Any, machine: Machine, most: int = 0) -> None:
    """Vectorize the last axis of a block and run its other loops on all cores.

    Args:
        kernel: The kernel.
        block: The block.
        machine: What it is made for.
        most: The longest vector, where that is not the machine's.
    """
    loops = kernel.schedule.get_loops(block)
    if not loops:
        return
    lanes = machine.lanes_of(kernel.dtype(block))
    lanes = min(lanes, most or lanes)
    outer, _ = kernel.vectorize(loops[-1], lanes)
    kernel.parallel(loops[:-1] or [outer])
