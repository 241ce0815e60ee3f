"""Operands in step: at each position, what stands beside each other stood beside each other before.

A label says which channel a position holds, and several positions may hold the same one. What is in
step is therefore told by the index that each position had originally, axis by axis.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, fx

from narrows.ir.held import Held, RaggedError, Side, merged
from narrows.ir.labels import Bools, Ints, broadcast
from narrows.ir.meta import Meta
from narrows.ir.ops.protocols import Builder, Needs


class Aligning(Builder, Protocol):
    """What it takes to bring operands in step."""

    @property
    def demand(self) -> Needs:
        """The channels that are needed."""
        ...

    def block(self, node: fx.Node) -> Bools | None:
        """Return the labels that would do in place of those that a node is to hold."""
        ...


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


def in_step(rw: Aligning, node: fx.Node, sides: Sequence[Side], axes: Iterable[int]) -> None:
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


def _wanted(rw: Aligning, node: fx.Node, axis: int, indices: Sequence[Tensor]) -> Ints:
    """Return the original indices that operands are to have along an axis; of one that is summed
    over, those that all of them have."""
    if axis < len(rw.facts.value(node).shape):
        return rw.wanted(node, axis)
    lines = [rw.line(node, i, axis) for i in indices]
    return functools.reduce(np.intersect1d, lines)


def aligned(
    rw: Aligning, node: fx.Node, skip_axis: int | None = None
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


def _alike(rw: Aligning, node: fx.Node, held: dict[int, Held]) -> Tensor | None:
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


def _constant_operand(rw: Aligning, node: fx.Node, slot: int, labels: Tensor) -> fx.Node:
    read = rw.facts.flows[node].reads[slot]
    value = rw.facts.value(read.operand)
    assert read.source is not None
    data = value.const[read.source[labels.numpy()]]
    # What only fills a place may be anything; one makes no division by zero.
    data = np.where(np.isnan(data), 1.0, data)
    tensor = torch.from_numpy(np.asarray(data)).to(Meta(read.operand).dtype)
    return rw.constant(f"{read.operand.name}_constant", tensor)
