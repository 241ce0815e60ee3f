"""Operands in step: at each position, what stands beside each other stood beside each other before.

A label says which channel a position holds, and several positions may hold the same one. What is in
step is therefore told by the index that each position had originally, axis by axis.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, fx

from narrows.ir.labels import Ints, Value, broadcast, match
from narrows.ir.program import Meta
from narrows.ir.rewrite.held import Held, RaggedError

if TYPE_CHECKING:
    from narrows.ir.rewrite.rewriter import Rewriter


class Side:
    """One operand, seen along the axes of the result.

    Attributes:
        held: The operand.
        stands: Per axis of the operand the axis of the result that it lies along.
        index: Per axis of the result, the original index at each position, in a shape that
            broadcasts; axes along which the operand is broadcast are left out.
    """

    def __init__(
        self, source: Value, held: Held, rank: int, stands: Sequence[int], axes: Iterable[int]
    ) -> None:
        self.held, self.stands = held, list(stands)
        self.index: dict[int, Tensor] = {}
        own = source.index(held.places)
        sorts = np.argsort(self.stands).tolist()
        for axis in axes:
            if axis not in self.stands:
                continue
            at = self.stands.index(axis)
            if at in own:
                sizes = [1] * rank
                for a in sorts:
                    sizes[self.stands[a]] = own[at].shape[a]
                self.index[axis] = own[at].permute(sorts).reshape(sizes)
            elif source.shape[at] > 1:  # no channels, but as long as the result
                ruler = torch.arange(held.shape[at])
                self.index[axis] = ruler.view([-1 if a == axis else 1 for a in range(rank)])

    def cut(self, rw: Rewriter, axis: int, wanted: Ints) -> bool:
        """Gather the original indices ``wanted`` along an axis; whether that can be done."""
        along = line(self.index[axis], axis)
        if along is None:
            return False
        index = match(along, wanted)
        if index is None:
            return False
        self.held = rw.gather(self.held, self.stands.index(axis), index)
        for a, one in self.index.items():
            if one.shape[axis] > 1 or a == axis:
                self.index[a] = one.index_select(axis, torch.from_numpy(index))
        return True


def line(index: Tensor, axis: int) -> Ints | None:
    """Return the original index at each position of an axis, ``None`` where it is not one."""
    rows = index.movedim(axis, -1).reshape(-1, index.shape[axis])
    return rows[0].numpy() if len(rows) == 1 or bool((rows == rows[:1]).all()) else None


def agree(indices: Sequence[Tensor], axis: int) -> bool:
    """Whether operands have the same original index at each position of an axis."""
    first, *others = indices
    for other in others:
        if other.shape[axis] != first.shape[axis]:
            return False
        if other.shape == first.shape:
            if other is not first and not torch.equal(other, first):
                return False
            continue
        try:
            if not bool((other == first).all()):
                return False
        except RuntimeError:
            return False
    return True


def in_step(rw: Rewriter, node: fx.Node, sides: Sequence[Side], axes: Iterable[int]) -> None:
    """Bring operands of ``node`` in step along axes, by gathers where they are not.

    Args:
        rw: The rewriter.
        node: The node whose operands they are.
        sides: The operands.
        axes: Axes of the result.
    """
    for axis in axes:
        having = [s for s in sides if axis in s.index]
        if len(having) > 1 and not agree([s.index[axis] for s in having], axis):
            wanted = _wanted(rw, node, axis, [s.index[axis] for s in having])
            if not all(s.cut(rw, axis, wanted) for s in having):
                raise RaggedError(node, rw.block(node))


def _wanted(rw: Rewriter, node: fx.Node, axis: int, indices: Sequence[Tensor]) -> Ints:
    """Return the original indices that operands are to have along an axis; of one that is summed
    over, those that all of them have."""
    if axis < len(rw.facts.value(node).shape):
        return rw.wanted(node, axis)
    lines = [rw.line(node, i, axis) for i in indices]
    return functools.reduce(np.intersect1d, lines)


def merged(sides: Sequence[Side], axes: Iterable[int]) -> dict[int, Tensor]:
    """Return the index along each axis, of operands that are in step."""
    return {
        axis: max((s.index[axis] for s in sides if axis in s.index), key=Tensor.numel)
        for axis in axes
    }


def aligned(
    rw: Rewriter, node: fx.Node, skip_axis: int | None = None
) -> tuple[list[fx.Node], Tensor, tuple[int, ...]]:
    """Return the operands of an element-wise node with their channels in step.

    Returns:
        The new operand per read, the result's places and its shape (with ``skip_axis`` set to
        1).
    """
    reads = rw.facts.flows[node].reads
    value = rw.facts.value(node)
    if len(reads) == 1 and reads[0].straight and skip_axis is None:
        one = rw.operand(node, 0)
        if rw.facts.value(reads[0].operand).shape == value.shape:
            return [one.node], one.places, one.shape
    constants = rw.demand.constant_operands(node) if skip_axis is None else set()
    held = {s: rw.operand(node, s) for s in range(len(reads)) if s not in constants}
    places = _alike(rw, node, held)
    if places is None:
        rank = len(value.shape)
        parts = [(reads[s].operand, h, range(rank - len(h.shape), rank)) for s, h in held.items()]
        sides = rw.sides(node, parts, rank, value.axes)
        places = value.placed(merged(sides, value.axes))
        held = {s: side.held for s, side in zip(held, sides, strict=True)}
    lead = {s: len(value.shape) - len(h.shape) for s, h in held.items()}
    shapes = [
        tuple(1 if a + lead[s] == skip_axis else size for a, size in enumerate(h.shape))
        for s, h in held.items()
    ]
    nodes = [
        held[s].node if s in held else _constant_operand(rw, node, s, value.at(places))
        for s in range(len(reads))
    ]
    return nodes, places, broadcast(shapes)


def _alike(rw: Rewriter, node: fx.Node, held: dict[int, Held]) -> Tensor | None:
    """Return the result's places where all operands are as the result and hold the same."""
    value = rw.facts.value(node)
    first = next(iter(held.values()))
    for slot, one in held.items():
        source = rw.facts.value(rw.facts.flows[node].reads[slot].operand)
        if source.tensor.shape != value.tensor.shape:
            return None
        if one.places is not first.places and not torch.equal(one.places, first.places):
            return None
    return first.places


def _constant_operand(rw: Rewriter, node: fx.Node, slot: int, labels: Tensor) -> fx.Node:
    read = rw.facts.flows[node].reads[slot]
    value = rw.facts.value(read.operand)
    assert read.source is not None
    data = value.const[read.source[labels.numpy()]]
    # What only fills a place may be anything; one makes no division by zero.
    data = np.where(np.isnan(data), 1.0, data)
    tensor = torch.from_numpy(np.asarray(data)).to(Meta(read.operand).dtype)
    return rw.constant(f"{read.operand.name}_constant", tensor)
