"""`Value`: a tensor of the program as the compiler holds it, in any order of axes and padded.

A program thinks in ``[N, C, H, W]``. Kernels want the channels last, and a multiple of the vector
width of them. A value says how it is stored, so that a permutation costs nothing until somebody
needs another order.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor, and how it is stored.

    Attributes:
        shape: The shape that the program sees.
        dtype: The dtype as numpy spells it.
        order: Stored axis ``i`` holds axis ``order[i]`` of ``shape``.
        width: The stored size of the last stored axis; what is beyond the program's size is
            arbitrary and must not be read.
        expr: The Relax expression; ``None`` for a constant.
        array: The numbers of a constant, in the order that the program sees.
    """

    shape: tuple[int, ...]
    dtype: str
    order: tuple[int, ...]
    width: int
    expr: Any = None
    array: np.ndarray | None = None

    @classmethod
    def constant(cls, array: np.ndarray) -> Value:
        """Return a constant; its expression is made when it is used."""
        shape = tuple(array.shape)
        order = tuple(range(array.ndim))
        return cls(shape, array.dtype.name, order, shape[-1] if shape else 1, array=array)

    @property
    def rank(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def stored(self) -> tuple[int, ...]:
        """The stored shape."""
        if not self.shape:
            return ()
        return (*(self.shape[a] for a in self.order[:-1]), self.width)

    @property
    def padded(self) -> bool:
        """Whether the last stored axis is longer than the program's."""
        return bool(self.shape) and self.width != self.shape[self.order[-1]]

    @property
    def is_plain(self) -> bool:
        """Whether the tensor is stored as the program sees it."""
        return self.order == tuple(range(self.rank)) and not self.padded

    def at(self, axis: int) -> int:
        """Return which stored axis holds an axis of the program; negative ones count from the
        end."""
        return self.order.index(axis % self.rank)

    def permuted(self, axes: tuple[int, ...]) -> Value:
        """Return the tensor whose axis ``i`` is this one's axis ``axes[i]``; nothing moves."""
        if self.array is not None:
            return Value.constant(np.ascontiguousarray(self.array.transpose(axes)))
        place = {axis: i for i, axis in enumerate(axes)}
        shape = tuple(self.shape[a] for a in axes)
        return dataclasses.replace(self, shape=shape, order=tuple(place[a] for a in self.order))

    def expanded(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return shape and order with axes of size 1 in front, up to ``rank`` axes."""
        more = rank - self.rank
        order = (*range(more), *(a + more for a in self.order))
        return (1,) * more + self.shape, order


def regrouped(value: Value, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the order of a reshaped value that needs no copy, or ``None``.

    Axes that are split or merged must lie beside each other as they are stored, and the padded one
    must stay as it is.

    Args:
        value: The value to reshape.
        shape: The shape it gets.
    """
    groups = _groups(value.shape, shape)
    if groups is None:
        return None
    stored = [a for a in value.order if value.shape[a] != 1]
    order: list[int] = []
    position = 0
    by_first = {before[0]: (before, after) for before, after in groups}
    while position < len(stored):
        before, after = by_first.get(stored[position], ((), ()))
        if not before or tuple(stored[position : position + len(before)]) != before:
            return None
        order.extend(after)
        position += len(before)
    units = [a for a, size in enumerate(shape) if size == 1]
    if not order:
        return tuple(units) if not value.padded else None
    if value.padded:
        last = by_first.get(value.order[-1])
        if last is None or len(last[0]) != 1 or len(last[1]) != 1:
            return None
    return (*units, *order)


def _groups(
    old: tuple[int, ...], new: tuple[int, ...]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]] | None:
    """Return which axes of one shape make up which of another, axes of size 1 left out."""
    if math.prod(old) != math.prod(new) or 0 in old:
        return None
    a = [i for i, size in enumerate(old) if size != 1]
    b = [i for i, size in enumerate(new) if size != 1]
    groups = []
    while a or b:
        before, after = [a.pop(0)], [b.pop(0)]
        left, right = old[before[0]], new[after[0]]
        while left != right:
            if left < right:
                before.append(a.pop(0))
                left *= old[before[-1]]
            else:
                after.append(b.pop(0))
                right *= new[after[-1]]
        groups.append((tuple(before), tuple(after)))
    return groups
