"""Finds the kind of a kernel, and applies its schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import s_tir, tirx

from narrows.backends.tvm.devices import Machine
from narrows.backends.tvm.kernels import CONTRACTION, DEPTHWISE, DOT, ROWS, WINDOW
from narrows.backends.tvm.schedules.elementwise import schedule_elementwise
from narrows.backends.tvm.schedules.loops import Kernel
from narrows.backends.tvm.schedules.rows import schedule_rows
from narrows.backends.tvm.schedules.tiled import (
    CHANNELS,
    SPACE,
    schedule_reduction,
    schedule_tiled,
)

# More candidates than these seldom hold a faster one.
MOST = 16

# Below so many bytes of weights every row of the result may run through all of them: they stay
# in a core's second-level cache.
NEAR = 1024 * 1024


@dataclass(frozen=True)
class Choice:
    """The tile of a kernel.

    Attributes:
        rows: Positions along the last spatial axis that are computed at once.
        vectors: Vectors of channels that are computed at once.
        outer: Which loop is outside: ``channels`` or ``space``.
    """

    rows: int = 1
    vectors: int = 1
    outer: str = SPACE

    def to_json(self) -> list[Any]:
        """Return the choice as JSON data."""
        return [self.rows, self.vectors, self.outer]

    @staticmethod
    def from_json(data: Sequence[Any]) -> Choice:
        """Return what `to_json` wrote."""
        return Choice(int(data[0]), int(data[1]), str(data[2]))


def choices(function: tirx.PrimFunc, machine: Machine) -> list[Choice]:
    """Return the choices for a kernel, the most promising first; at least one."""
    kernel = Kernel(function)
    main = kernel.with_role(CONTRACTION, DOT, DEPTHWISE, WINDOW)
    if main is None:
        return [Choice()]
    rows, channels = kernel.extents(main)[-2:]
    if kernel.role(main) in (CONTRACTION, DOT):
        steps = math.prod(kernel.reductions(main))
        whole = kernel.role(main) == DOT and bool(machine.dot)
        depth = steps * (1 if kernel.role(main) == DOT else 4)
        return _contractions(rows, channels, depth, machine, kernel.dtype(main), whole)
    return _windows(rows, channels, machine, kernel.dtype(main))


def _contractions(
    rows: int, channels: int, depth: int, machine: Machine, dtype: str, whole: bool
) -> list[Choice]:
    """Return the choices for sums over ``depth`` bytes of weights a channel.

    Args:
        rows: Rows of the result.
        channels: Channels of the result.
        depth: The bytes.
        machine: What it is made for.
        dtype: Of the sums.
        whole: Whether tiles have to divide the rows; TVM puts no instruction into what remains.
    """
    lanes = machine.lanes_of(dtype)
    blocks = channels // lanes
    if channels % lanes:
        return [Choice(1 if whole else min(rows, 4), 1, SPACE)]
    heavy = channels * depth > NEAR
    orders = (CHANNELS, SPACE) if heavy else (SPACE, CHANNELS)
    found = []
    for vectors in (1, 2, 3, 4, 6, 8):
        if blocks % vectors:
            continue
        for tile in range(1, min(rows, 28) + 1):
            if whole and rows % tile:
                continue
            if tile * vectors + vectors + 1 <= machine.registers:
                found.append((_cost(rows, blocks, tile, vectors, machine.registers), tile, vectors))
    found.sort()
    best = found[: MOST // 2]
    return [Choice(tile, vectors, outer) for outer in orders for _, tile, vectors in best]


def _cost(rows: int, blocks: int, tile: int, vectors: int, registers: int) -> float:
    """Return the cycles of one step of the sum, for all of a row's results.

    Two multiply-adds and two loads start in a cycle; a multiply-add takes four. A tile that does
    not divide the row leaves a remainder that is computed in a tile of its own.
    """

    def cycles(count: int) -> float:
        return max(count * vectors / 2, (count + vectors) / 2, 4.0)

    full, rest = divmod(rows, tile)
    once = full * cycles(tile) + (cycles(rest) if rest else 0.0)
    if tile * vectors + 2 * vectors > registers - 4:  # LLVM begins to keep some in memory
        once *= 1.05
    # Ends of rows cost a little more than their share: loops begin anew.
    return (once + 0.2 * (full + bool(rest))) * blocks / vectors


def _windows(rows: int, channels: int, machine: Machine, dtype: str) -> list[Choice]:
    lanes = machine.lanes_of(dtype)
    blocks = channels // lanes
    vectors = [v for v in (1, 2, 4) if blocks and blocks % v == 0] or [1]
    tiles = [t for t in (7, 8, 4, 14, 2, 1) if t <= rows]
    divisors = [t for t in tiles if rows % t == 0] or tiles
    most = machine.registers - 4
    pairs = [(t, v) for v in vectors for t in divisors if t * v <= most]
    # A vector of channels is a whole line of the cache, and its image stays near; not so of codes,
    # which are bytes.
    orders = (SPACE, CHANNELS) if dtype == "int32" else (CHANNELS, SPACE)
    return [Choice(t, v, outer) for outer in orders for t, v in pairs][:MOST]


def scheduled(function: tirx.PrimFunc, choice: Choice, machine: Machine) -> tirx.PrimFunc | None:
    """Return the kernel with a schedule applied, or ``None`` where there is none for it."""
    kernel = Kernel(function)
    if not kernel.blocks:
        return None
    try:
        _schedule(kernel, choice, machine)
    except s_tir.ScheduleError:
        return None
    return kernel.schedule.mod["main"]


def _schedule(kernel: Kernel, choice: Choice, machine: Machine) -> None:
    main = kernel.with_role(CONTRACTION, DOT, DEPTHWISE, WINDOW)
    if main is not None:
        unrolled = kernel.role(main) in (DEPTHWISE, WINDOW)
        schedule_tiled(kernel, main, choice.rows, choice.vectors, choice.outer, unrolled, machine)
        return
    if kernel.with_role(ROWS) is not None:
        schedule_rows(kernel, machine)
        return
    if any(kernel.reductions(block) for block in kernel.blocks):
        schedule_reduction(kernel, machine)
        return
    schedule_elementwise(kernel, machine)
