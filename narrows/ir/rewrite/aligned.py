"""Operands of element-wise operators in step: each position meets channels that belong together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from narrows.ir.labels import broadcast, match
from narrows.ir.program import Meta
from narrows.ir.rewrite.held import Held, RaggedError

if TYPE_CHECKING:
    from narrows.ir.rewrite.rewriter import Rewriter


def aligned(
    rw: Rewriter, node: fx.Node, skip_axis: int | None = None
) -> tuple[list[fx.Node], Tensor, tuple[int, ...]]:
    """Return the operands of an element-wise node with their channels in step.

    Returns:
        The new operand per read, the result's labels and its shape (with ``skip_axis`` set to
        1).
    """
    reads = rw.facts.flows[node].reads
    if len(reads) == 1 and reads[0].straight and skip_axis is None:
        one = rw.operand(node, 0)
        if rw.facts.value(reads[0].operand).shape == rw.facts.value(node).shape:
            return [one.node], one.labels, one.shape
    constants = rw.demand.constant_operands(node) if skip_axis is None else set()
    held = {s: rw.operand(node, s) for s in range(len(reads)) if s not in constants}
    labels = _in_step(rw, node, held)
    if labels is None:
        held = _put_in_step(rw, node, held)
        labels = _in_step(rw, node, held)
    if labels is None:
        raise RaggedError(node, None)
    held = {s: _cut_along(rw, node, s, h, labels) for s, h in held.items()}
    shapes = [
        tuple(
            1 if a - len(h.shape) + labels.dim() == skip_axis else s for a, s in enumerate(h.shape)
        )
        for h in held.values()
    ]
    shape = broadcast(shapes)
    nodes = [
        held[s].node if s in held else _constant_operand(rw, node, s, labels)
        for s in range(len(reads))
    ]
    return nodes, labels, shape


def _in_step(rw: Rewriter, node: fx.Node, held: dict[int, Held]) -> Tensor | None:
    """Return the result's labels if every position meets operands that belong together."""
    reads, value = rw.facts.flows[node].reads, rw.facts.value(node)
    rank = value.tensor.dim()
    if _is_even(rw, node, held):
        first = next(iter(held.values())).labels
        return first.reshape([1] * (rank - first.dim()) + list(first.shape))
    code: Any = torch.zeros([1] * rank, dtype=torch.int64)
    known = np.zeros(value.count, dtype=np.int64)
    for slot, one in held.items():
        read = reads[slot]
        assert read.source is not None
        count = rw.facts.value(read.operand).count
        labels = one.labels.reshape([1] * (rank - one.labels.dim()) + list(one.labels.shape))
        try:
            code = code * count + labels
        except RuntimeError:
            return None
        known = known * count + read.source
    flat = code.flatten().numpy()
    for candidates in (np.flatnonzero(rw.need(node)), np.arange(value.count)):
        order = candidates[np.argsort(known[candidates], kind="stable")]
        at = np.minimum(np.searchsorted(known[order], flat), len(order) - 1)
        found = order[at]
        if np.array_equal(known[found], flat):
            return torch.from_numpy(found).view(code.shape)
    return None


def _is_even(rw: Rewriter, node: fx.Node, held: dict[int, Held]) -> bool:
    """Whether all operands have the result's labels and hold the same of them."""
    count = rw.facts.value(node).count
    (first, *others) = held.values()
    for slot in held:
        read = rw.facts.flows[node].reads[slot]
        if not (read.straight and rw.facts.value(read.operand).count == count):
            return False
    return all(
        other.labels is first.labels or torch.equal(first.labels, other.labels) for other in others
    )


def _cut_along(rw: Rewriter, node: fx.Node, slot: int, held: Held, labels: Tensor) -> Held:
    """Cut an operand that has no channels of its own along the axes where the result's are
    cut."""
    value, operand = rw.facts.value(node), rw.facts.flows[node].reads[slot].operand
    source, lead = rw.facts.value(operand), labels.dim() - len(held.shape)
    loose = [
        a for a in value.axes
        if a >= lead and a - lead not in source.axes and held.shape[a - lead] > 1
    ]  # fmt: skip
    if not loose or not rw.narrowed(node, labels):
        return held
    where = rw.positions(node, labels)
    if where is None:
        raise RaggedError(node, None)
    for axis in loose:
        held = rw.gather(held, axis - lead, where[axis])
    return held


def _put_in_step(rw: Rewriter, node: fx.Node, held: dict[int, Held]) -> dict[int, Held]:
    """Gather each operand into the original order of the result's channels."""
    value = rw.facts.value(node)
    if len(value.axes) != 1:
        reads = rw.facts.flows[node].reads
        return {slot: _in_order(rw, node, reads[slot].operand, one) for slot, one in held.items()}
    (axis,) = value.axes
    along = value.tensor.flatten().numpy()
    order = along[rw.need(node)[along]]
    result = {}
    for slot, one in held.items():
        read = rw.facts.flows[node].reads[slot]
        own = axis - (len(value.shape) - len(one.shape))
        if own < 0 or rw.facts.value(read.operand).count == 1:
            result[slot] = one
            continue
        assert read.source is not None
        index = match(one.labels.flatten().numpy(), read.source[order])
        if index is None:
            raise RaggedError(node, None)
        result[slot] = rw.gather(one, own, index)
    return result


def _in_order(rw: Rewriter, node: fx.Node, operand: fx.Node, held: Held) -> Held:
    """Gather an operand with channels on several axes into its original order along each."""
    where = rw.positions(operand, held.labels)
    if where is None:
        raise RaggedError(node, None)
    for axis, index in where.items():
        if (np.diff(index) < 0).any():
            held = rw.gather(held, axis, np.argsort(index, kind="stable"))
    return held


def _constant_operand(rw: Rewriter, node: fx.Node, slot: int, labels: Tensor) -> fx.Node:
    read = rw.facts.flows[node].reads[slot]
    value = rw.facts.value(read.operand)
    assert read.source is not None
    data = value.const[read.source[labels.numpy()]]
    # What only fills a place may be anything; one makes no division by zero.
    data = np.where(np.isnan(data), 1.0, data)
    tensor = torch.from_numpy(np.asarray(data)).to(Meta(read.operand).dtype)
    return rw.constant(f"{read.operand.name}_constant", tensor)
