"""Kernels without sums: one loop nest, the last axis in vectors, the others on all cores."""

from __future__ import annotations

from typing import Any

from narrows.backends.tvm.devices import Machine
from narrows.backends.tvm.schedules.loops import Kernel


def schedule_elementwise(kernel: Kernel, machine: Machine) -> None:
    """Schedule a kernel that computes every element on its own."""
    last = kernel.inline(())
    spread(kernel, last, machine)


def spread(kernel: Kernel, block: Any, machine: Machine) -> None:
    """Vectorize the last axis of a block and run its other loops on all cores."""
    loops = kernel.schedule.get_loops(block)
    if not loops:
        return
    lanes = machine.lanes_of(kernel.dtype(block))
    outer, _ = kernel.vectorize(loops[-1], lanes)
    kernel.parallel(loops[:-1] or [outer])
