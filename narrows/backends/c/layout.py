"""Where the elements of a tensor lie: views on buffers, and the loops that walk over them.

A tensor is a `View`: a place in a buffer and a step per axis, as in torch. Images are stored with
their channels last, so most operators that only move elements (``permute``, ``select``, ``split``)
come down to another view. What they do is not spelled out anywhere: they run on the *addresses* of
the elements, and the addresses that come out are a view again, or a copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(eq=False)
class Buffer:
    """A piece of memory.

    Attributes:
        name: What it holds, for people.
        size: Its bytes.
        kind: ``arena``, ``input``, ``output`` or ``constant``.
        symbol: Its name in C, unless it lies in the arena.
        unit: The bytes of an element.
    """

    name: str
    size: int
    kind: str = "arena"
    symbol: str = ""
    unit: int = 1


@dataclass(frozen=True)
class View:
    """A tensor of codes. Places and distances count elements, whatever their bytes.

    Attributes:
        buffer: Where they lie.
        offset: The place of the first.
        shape: The tensor's shape.
        strides: Per axis, how far apart neighbours lie.
    """

    buffer: Buffer
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    def addresses(self) -> Tensor:
        """Return the place of every element, as a float64 tensor of the view's shape.

        Not int64: some operators that move elements do not know it.
        """
        total = torch.full((1,) * len(self.shape), float(self.offset), dtype=torch.float64)
        for axis, (count, step) in enumerate(zip(self.shape, self.strides, strict=True)):
            line = torch.arange(count, dtype=torch.float64) * step
            total = total + line.reshape([-1 if a == axis else 1 for a in range(len(self.shape))])
        return total.expand(self.shape)

    def order(self) -> tuple[int, ...]:
        """Return the axes as they lie in memory, the one with the largest step first."""
        axes = range(len(self.shape))
        return tuple(sorted(axes, key=lambda a: (-abs(self.strides[a]), a)))

    def lies(self, order: Sequence[int]) -> bool:
        """Whether the elements follow each other in memory without gaps, axes in this order."""
        wanted = packed(self.shape, order)
        pairs = zip(self.shape, self.strides, wanted, strict=True)
        return all(count == 1 or have == want for count, have, want in pairs)

    def broadcast(self, shape: Sequence[int]) -> View:
        """Return the view repeated to a shape, as arithmetic does."""
        lead = len(shape) - len(self.shape)
        strides = [0] * lead + [
            0 if have == 1 and want != 1 else step
            for have, step, want in zip(self.shape, self.strides, shape[lead:], strict=True)
        ]
        return View(self.buffer, self.offset, tuple(shape), tuple(strides))


def packed(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a tensor without gaps whose axes lie in this order."""
    strides, step = [0] * len(shape), 1
    for axis in reversed(order):
        strides[axis] = step
        step *= shape[axis]
    return tuple(strides)


def row_major(rank: int) -> tuple[int, ...]:
    """Return the order in which torch stores a tensor."""
    return tuple(range(rank))


def channels_last(rank: int) -> tuple[int, ...]:
    """Return the order in which images are stored: axis 1 last, where there is one."""
    return (0, *range(2, rank), 1) if rank > 1 else row_major(rank)


def viewed(buffer: Buffer, addresses: Tensor) -> View | None:
    """Return the view whose elements have these addresses, or ``None``."""
    first, lines = _lines(addresses)
    if lines is None:
        return None
    strides = [int(line[1]) if len(line) > 1 else 0 for line in lines]
    even = all(
        (line == np.arange(len(line)) * step).all()
        for line, step in zip(lines, strides, strict=True)
    )
    return View(buffer, first, tuple(addresses.shape), tuple(strides)) if even else None


def _lines(addresses: Tensor) -> tuple[int, list[np.ndarray] | None]:
    """Return the first address, and per axis what its index adds, if each adds on its own."""
    rank = addresses.dim()
    first = int(addresses[(0,) * rank])
    lines = []
    total = torch.full((1,) * rank, float(first), dtype=torch.float64)
    for axis in range(rank):
        line = addresses[tuple(slice(None) if a == axis else 0 for a in range(rank))] - first
        total = total + line.reshape([-1 if a == axis else 1 for a in range(rank)])
        lines.append(line.numpy().astype(np.int64))
    return first, lines if torch.equal(total, addresses) else None


# ------------------------------------------------------------------ loops


@dataclass(frozen=True)
class Loop:
    """One loop over tensors side by side.

    Attributes:
        count: How often it turns.
        steps: Per tensor, how far it goes each time.
        table: Where it goes in the last tensor, instead of by steps.
    """

    count: int
    steps: tuple[int, ...]
    table: tuple[int, ...] | None = None


def loops(views: Sequence[View], order: Sequence[int]) -> list[Loop]:
    """Return the loops over views of one shape, the outermost first, as few as possible."""
    made: list[Loop] = []
    for axis in order:
        if views[0].shape[axis] > 1:
            made.append(Loop(views[0].shape[axis], tuple(v.strides[axis] for v in views)))
    return joined(made)


def joined(made: Sequence[Loop]) -> list[Loop]:
    """Return loops with those made one that go on where the inner one ends."""
    done: list[Loop] = []
    for loop in made:
        last = done[-1] if done else None
        if last is None or last.table is not None or loop.table is not None:
            done.append(loop)
        elif last.steps == tuple(step * loop.count for step in loop.steps):
            done[-1] = Loop(last.count * loop.count, loop.steps)
        else:
            done.append(loop)
    return done


def copy_loops(target: View, addresses: Tensor) -> tuple[int, list[Loop]]:
    """Return the first address and the loops that copy from addresses to a view of their shape."""
    first, lines = _lines(addresses)
    if lines is None:  # no rule at all: one long table
        flat = addresses.permute(target.order()).reshape(-1).numpy().astype(np.int64)
        return 0, [Loop(len(flat), (1, 0), tuple(flat.tolist()))]
    made: list[Loop] = []
    for axis in target.order():
        step, line = target.strides[axis], lines[axis]
        if len(line) == 1:
            continue
        found = factored(line)
        if found is None:
            made.append(Loop(len(line), (step, 0), tuple(line.tolist())))
            continue
        inner = math.prod(count for count, _ in found)
        for count, jump in found:
            inner //= count
            made.append(Loop(count, (step * inner, jump)))
    return first, joined(made)


def factored(line: np.ndarray) -> list[tuple[int, int]] | None:
    """Return nested loops ``(count, step)`` that make a sequence which starts at 0, or ``None``."""
    if len(line) == 1:
        return []
    step = int(line[1] - line[0])
    differing = np.flatnonzero(np.diff(line) != step)
    run = int(differing[0]) + 1 if len(differing) else len(line)
    for count in range(run, 1, -1):
        if len(line) % count:
            continue
        heads = line[::count]
        if (line.reshape(-1, count) == heads[:, None] + np.arange(count) * step).all():
            outer = factored(heads)
            return None if outer is None else [*outer, (count, step)]
    return None


def as_view(value: Any) -> View:
    """Return a value that is known to be a view."""
    assert isinstance(value, View), value
    return value
