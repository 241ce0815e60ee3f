"""Channels as labels: which positions of a tensor belong to which channel.

A tensor's channels are named by integers, its *labels*. Positions that share a label live or die
together. The label tensor is *compact*: it has size 1 on every axis along which the labels do not
change, and broadcasts to the tensor's shape. An NCHW activation of 64 channels has labels of shape
``[1,64,1,1]``; flattened before a linear layer, ``[1,64*H*W]`` with each label repeated H*W times;
split into heads, ``[1,12,1,64]``.

Because labels are ordinary integer tensors, an operator that only moves data is analysed by
running it on them. This module holds the arithmetic; `narrows.ir.channels` walks the graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

Bools = np.ndarray
Ints = np.ndarray


@dataclass(eq=False)
class Value:
    """What the analysis knows of one tensor.

    Attributes:
        shape: The tensor's shape at the example's sizes.
        labels: The compact label tensor (int64), or ``None`` for a *free* value: one made of
            weights alone, whose channels are whatever its consumer makes of them.
        count: The number of labels; they are ``0 .. count-1``.
        const: Per label the value that all its elements have, or NaN where they are not one
            constant.
    """

    shape: tuple[int, ...]
    labels: Tensor | None
    count: int
    const: np.ndarray

    @property
    def free(self) -> bool:
        """Whether the value depends on weights alone."""
        return self.labels is None

    @property
    def tensor(self) -> Tensor:
        """The compact label tensor of a value that is not free."""
        assert self.labels is not None
        return self.labels

    @cached_property
    def axes(self) -> tuple[int, ...]:
        """The axes along which the labels change."""
        return () if self.labels is None else varying(self.labels)

    @cached_property
    def natural(self) -> bool:
        """Whether every label stands at one position, in the order of their numbers."""
        labels = self.tensor
        return labels.numel() == self.count and is_count(labels.reshape(-1).numpy())

    @cached_property
    def places(self) -> Tensor:
        """The number of each position of the label tensor, in its shape.

        A label says which channel stands somewhere, its place says where. They differ where one
        channel fills several positions: a flattened one, one joined to itself, one whose head is
        repeated.
        """
        if self.natural:
            return self.tensor
        return torch.arange(self.tensor.numel()).view(self.tensor.shape)

    def at(self, places: Tensor) -> Tensor:
        """Return the labels at places."""
        if self.natural:
            return places
        return self.tensor if places is self.places else self.tensor.reshape(-1)[places]

    def index(self, places: Tensor) -> dict[int, Tensor]:
        """Return per labelled axis the index at each of some places, compact like labels."""
        if len(self.axes) < 2:
            return dict.fromkeys(self.axes, places)
        grids = np.unravel_index(places.numpy(), tuple(self.tensor.shape))
        return {axis: compact(torch.from_numpy(grids[axis]), (axis,)) for axis in self.axes}

    def placed(self, index: Mapping[int, Tensor]) -> Tensor:
        """Return the places at the given indices along each labelled axis, which broadcast."""
        if not self.axes:
            return self.places
        places = index[self.axes[0]]
        for axis in self.axes[1:]:
            places = places * self.tensor.shape[axis] + index[axis]
        return places

    def known(self) -> Bools:
        """Which labels are constants."""
        return ~np.isnan(self.const)


def broadcast(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape that tensors of the given shapes, which fit, have together."""
    (first, *others) = shapes
    if all(s == first for s in others):
        return first
    return tuple(torch.broadcast_shapes(*shapes))


# Masks are short and asked for all the time: of their bytes, C tells what numpy tells by way of
# Python. Numbers would not do, hence the assertions.
_BOOL = np.dtype(bool)


def how_many(mask: Bools) -> int:
    """Return how many entries of a mask are true."""
    assert mask.dtype is _BOOL
    return mask.tobytes().count(1)


def some(mask: Bools) -> bool:
    """Whether any entry of a mask is true."""
    assert mask.dtype is _BOOL
    return 1 in mask.tobytes()


def same(a: Bools, b: Bools) -> bool:
    """Whether two masks of one length are equal."""
    return a is b or a.tobytes() == b.tobytes()


def is_count(positions: Ints) -> bool:
    """Whether positions are 0, 1, 2 and so on."""
    return not some(positions != count_to(len(positions)))


def distinct(numbers: Ints) -> int:
    """Return how many different ones there are among small numbers from zero up."""
    return int(np.count_nonzero(np.bincount(numbers)))


def count_to(size: int) -> Ints:
    """Return 0, 1, 2 ... ``size - 1``: a part of one array that nobody writes to."""
    global _COUNT
    if size > len(_COUNT):
        _COUNT = np.arange(2 * size)
        _COUNT.flags.writeable = False
    return _COUNT[:size]


_COUNT = np.arange(4096)
_COUNT.flags.writeable = False


def opaque(shape: Sequence[int]) -> Value:
    """Return a value with one label: all of it lives or dies together."""
    return Value(tuple(shape), torch.zeros([1] * len(shape), dtype=torch.int64), 1, unknown(1))


def free(shape: Sequence[int]) -> Value:
    """Return a value that depends on weights alone."""
    return Value(tuple(shape), None, 0, _NOTHING)


def channels(shape: Sequence[int], axis: int) -> Value:
    """Return a value with a fresh label per index of ``axis``."""
    rank, width = len(shape), shape[axis]
    size = [1] * rank
    size[axis] = width
    return Value(tuple(shape), torch.arange(width).view(size), width, unknown(width))


def grid(shape: Sequence[int], axes: Sequence[int]) -> Value:
    """Return a value with a fresh label per place along some axes; one label for none."""
    sizes = [s if a in axes else 1 for a, s in enumerate(shape)]
    count = math.prod(sizes)
    return Value(tuple(shape), torch.arange(count).view(sizes), count, unknown(count))


def met(a: Value, b: Value) -> tuple[Ints, Ints]:
    """Return which labels of two tensors stand at one place: pairs, each once.

    The tensors have equal sizes wherever either has channels.
    """
    first, second = torch.broadcast_tensors(a.tensor, b.tensor)
    code = np.unique(first.reshape(-1).numpy() * b.count + second.reshape(-1).numpy())
    return code // b.count, code % b.count


def unknown(count: int) -> np.ndarray:
    """Return ``count`` times "not a constant"."""
    return np.full(count, np.nan)


_NOTHING = unknown(0)


def varying(labels: Tensor) -> tuple[int, ...]:
    """Return the axes of a compact label tensor that have more than one entry."""
    return tuple(a for a, s in enumerate(labels.shape) if s > 1)


def compact(labels: Tensor, keep: Sequence[int] = ()) -> Tensor:
    """Return the label tensor with every axis along which it is constant cut to size 1, but for
    those in ``keep``."""
    for axis in range(labels.dim()):
        size = labels.shape[axis]
        if size < 2 or axis in keep:
            continue
        first = labels.narrow(axis, 0, 1)
        if labels.stride(axis) == 0:
            labels = first
            continue
        if not torch.equal(first, labels.narrow(axis, size - 1, 1)):
            continue
        if bool((labels == first).all()):
            labels = first
    return labels


def number(source: Tensor) -> tuple[Tensor, Ints]:
    """Number the distinct entries of ``source``: labels ``0 .. n-1``, and the entry each stands
    for."""
    if source.numel() == 1:
        return torch.zeros_like(source), np.array([int(source)])
    flat = source.reshape(-1).numpy()
    if is_count(flat):
        return source, flat
    values, labels = torch.unique(source, return_inverse=True)
    return labels, values.numpy()


def merge(values: Sequence[Value], rank: int) -> tuple[Tensor, int, list[Ints]]:
    """Label the element-wise combination of several values, none of them free.

    Returns:
        The labels of the result, their count, and per value the label that each result label reads.
    """
    tensors = [
        v.tensor.reshape([1] * (rank - v.tensor.dim()) + list(v.tensor.shape)) for v in values
    ]
    wide = [i for i, v in enumerate(values) if v.count > 1]
    if not wide:
        labels, count = torch.zeros([1] * rank, dtype=torch.int64), 1
        return labels, count, [np.zeros(1, dtype=np.int64) for _ in values]
    lead = wide[0]
    if all(i == lead or torch.equal(tensors[i], tensors[lead]) for i in wide):
        count = values[lead].count
        identity = np.arange(count)
        zeros = np.zeros(count, dtype=np.int64)
        return tensors[lead], count, [identity if v.count > 1 else zeros for v in values]
    code = torch.zeros([1] * rank, dtype=torch.int64)
    for value, tensor in zip(values, tensors, strict=True):
        # Numbered anew at each step, for the product of many counts has no place in 64 bits.
        code = number(code * value.count + tensor)[0]
    labels, first = np.unique(code.reshape(-1).numpy(), return_index=True)
    sources = [t.expand(code.shape).reshape(-1).numpy()[first] for t in tensors]
    return code, len(labels), sources


def occurrence(labels: Ints) -> Ints:
    """Return for each position how many earlier positions carry the same label."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    lengths = np.diff(np.r_[starts, len(ordered)])
    result = np.empty(len(labels), dtype=np.int64)
    result[order] = np.arange(len(ordered)) - np.repeat(starts, lengths)
    return result


def match(old: Ints, new: Ints) -> Ints | None:
    """Return for each position of ``new`` the position of ``old`` that holds the same element.

    Labels may repeat (a flattened channel); the k-th occurrence stands for the k-th occurrence,
    for no rewrite changes the order inside a channel. ``None`` where ``new`` has an element
    ``old`` lacks.
    """
    if is_count(old):
        return new if int(new.max(initial=-1)) < len(old) else None
    if len(old) == len(new) and (old == new).all():
        return np.arange(len(old))
    if len(np.unique(old)) == len(old):
        place = np.full(int(max(old.max(), new.max(initial=-1))) + 1, -1)
        place[old] = np.arange(len(old))
        found = place[new]
        return None if (found < 0).any() else found
    base = max(len(old), len(new)) + 1
    old_code, new_code = old * base + occurrence(old), new * base + occurrence(new)
    order = np.argsort(old_code)
    at = np.searchsorted(old_code[order], new_code)
    at = np.minimum(at, len(old) - 1)
    found = order[at]
    return found if np.array_equal(old_code[found], new_code) else None


def even_sizes(mask: Tensor) -> list[int] | None:
    """Return the shape of what is left when only True positions are kept, or ``None`` if it is
    ragged.

    It is rectangular when every kept slice of an axis keeps the same number of slices of the next.
    """
    sizes: list[int] = []
    rows = mask.unsqueeze(0)  # [kept slices so far, axis, rest...]
    while rows.dim() > 1:
        alive = rows.flatten(2).any(-1) if rows.dim() > 2 else rows
        counts = alive.sum(1)
        if rows.shape[0] == 0 or bool((counts != counts[0]).any()) or int(counts[0]) == 0:
            return None
        sizes.append(int(counts[0]))
        rows = rows[alive]
    return sizes


def even_out(mask: Tensor) -> Tensor:
    """Return the smallest simple superset of ``mask`` that `even_sizes` accepts.

    Where True positions spread over two axes, each row that has any is filled up to the fullest
    row with its first free columns; over more axes, the result is the product of what is kept on
    each.
    """
    lines = {a: _line(mask, a) for a in varying(mask)}
    wide = [a for a, line in lines.items() if int(line.sum()) > 1]
    if len(wide) < 2:
        return mask
    if len(wide) > 2:
        full = torch.ones_like(mask)
        for axis, line in lines.items():
            full = full & line.view([-1 if a == axis else 1 for a in range(mask.dim())])
        return full
    result = mask.clone()
    part = result
    for axis, line in lines.items():
        if axis not in wide:
            part = part.narrow(axis, int(torch.nonzero(line)[0]), 1)
    flat = part.movedim(wide, (-2, -1)).reshape(mask.shape[wide[0]], mask.shape[wide[1]])  # a view
    width = int(flat.sum(1).max())
    for row in flat:
        missing = width - int(row.sum())
        if bool(row.any()) and missing > 0:
            row[torch.nonzero(~row).flatten()[:missing]] = True
    return result


def _line(mask: Tensor, axis: int) -> Tensor:
    return mask.movedim(axis, 0).flatten(1).any(1) if mask.dim() > 1 else mask


def runs(positions: Ints) -> tuple[int, int, int] | None:
    """Return ``(start, stop, step)`` when the positions are an arithmetic progression, else
    ``None``."""
    if len(positions) == 1:
        return int(positions[0]), int(positions[0]) + 1, 1
    steps = np.diff(positions)
    step = int(steps[0])
    if step < 1 or (steps != step).any():
        return None
    return int(positions[0]), int(positions[-1]) + 1, step
