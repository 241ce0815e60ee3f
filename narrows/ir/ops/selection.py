"""Operators that take a part of an axis: slice, select, split, unbind, index_select."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from narrows.ir.labels import opaque
from narrows.ir.ops.args import arguments, call, first_tensor
from narrows.ir.ops.barrier import barrier_flow
from narrows.ir.ops.layout import carried, moved
from narrows.ir.ops.row import Flow, Read, Row, labels_along
from narrows.ir.program import shape_of

if TYPE_CHECKING:
    from narrows.ir.channels import Facts
    from narrows.ir.rewrite import Held, Rewriter


@dataclass(frozen=True, kw_only=True)
class Selection(Row):
    """``y`` is a part of ``x`` along one axis: slice, select, split, unbind, index_select.

    Attributes:
        drops: Whether the axis itself goes away (select, unbind).
        axis: The argument that names the axis.
    """

    kind = "selection"
    drops: bool = False
    axis: str = "dim"

    def flow(self, facts: Facts, node: fx.Node) -> Flow:
        x = first_tensor(node)
        source = facts.value(x)
        operands = {x: carried(source)}
        for n in node.all_input_nodes:
            if n is not x and shape_of(n) is not None:
                if not facts.is_free(n):
                    return barrier_flow(
                        facts, node, "which channels it takes is computed at run time"
                    )
                operands[n] = facts.data(n)
        result = call(node, operands)
        if isinstance(result, Tensor):
            value, origin = moved(source, result)
            return Flow(value, (Read(x, origin),))
        parts = [moved(source, part) for part in result]
        return Flow(tuple(v for v, _ in parts), facts=(x, [o for _, o in parts]))

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> Held:
        return take(rewriter, node, node, self)


@dataclass(frozen=True, kw_only=True)
class Item(Row):
    """``getitem`` on the result of a split: a selection from the split's own input."""

    kind = "selection"

    @property
    def name(self) -> str:
        """The function's name."""
        return "getitem"

    def flow(self, facts: Facts, node: fx.Node) -> Flow:
        parent: Any
        parent, index = node.args
        flow = facts.flows[parent]
        if flow.barrier:
            return Flow(opaque(shape_of(node)), flow.reads, flow.barrier)
        x, origins = flow.facts
        return Flow(flow.value[index], (Read(x, origins[index]),))

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> Held:
        from narrows.ir.ops import table

        parent: Any = node.args[0]
        row = table.find(parent)
        if not isinstance(row, Selection):
            return rewriter.whole(node)
        return take(rewriter, node, parent, row)


def take(rewriter: Rewriter, node: fx.Node, call_node: fx.Node, row: Selection) -> Held:
    """Emit the selection of ``node`` by positions of what its operand now holds."""
    value, x = rewriter.facts.value(node), rewriter.facts.flows[node].reads[0].operand
    source = rewriter.facts.value(x)
    axis = arguments(call_node)[row.axis] % len(source.shape)
    held = rewriter.operand(node, 0) if source.axes != (axis,) else rewriter.held(x)
    whole = rewriter.need(node).all() and torch.equal(held.labels, source.tensor)
    if whole or axis not in source.axes:
        return _as_it_is(rewriter, node, call_node, held)
    ruler = torch.arange(source.shape[axis]).view(
        [-1 if a == axis else 1 for a in range(len(source.shape))]
    )
    part = call(call_node, {x: ruler.expand(source.shape), **rewriter.free_data(call_node)})
    part = part if isinstance(part, Tensor) else part[node.args[1]]
    asked = part.reshape(-1)[:1] if row.drops else part.movedim(axis, 0).flatten(1)[:, 0]
    if source.axes == (axis,):
        return _gathered(rewriter, node, row, axis, asked.numpy())
    inner = rewriter.inward(node, held)
    if bool((torch.diff(asked) <= 0).any()):
        raise rewriter.ragged(node)
    if not row.drops:
        return rewriter.retag(node, held, rewriter.trim(inner, value))
    if held.shape[axis] != 1:
        raise rewriter.ragged(node)
    return rewriter.squeezed(node, held, inner, axis)


def _as_it_is(rewriter: Rewriter, node: fx.Node, call_node: fx.Node, held: Held) -> Held:
    value = rewriter.facts.value(node)
    inner = rewriter.inward(node, held).expand(held.shape)
    first = next(iter(arguments(call_node)))
    result = rewriter.preview(call_node, {first: inner}, rewriter.free_data(call_node))
    if node is call_node:
        return rewriter.emit(
            node, {first: held.node}, rewriter.trim(result, value), tuple(result.shape)
        )
    result = result[node.args[1]]
    return rewriter.item(node, call_node, held, rewriter.trim(result, value), tuple(result.shape))


def _gathered(
    rewriter: Rewriter, node: fx.Node, row: Selection, axis: int, asked: np.ndarray
) -> Held:
    facts = rewriter.facts
    x = facts.flows[node].reads[0].operand
    source, held = facts.value(x), rewriter.held(x)
    old = labels_along(source, axis)[0].expand(source.shape[axis]).numpy()
    place = rewriter.places(x, held, axis)  # original index -> index now, -1 where gone
    own = facts.flows[node].reads[0].source
    assert own is not None
    back = np.full(source.count, -1)
    back[own] = np.arange(len(own))
    wanted = rewriter.need(node)[back[old[asked]]]
    index = place[asked[wanted]]
    if (index < 0).any():
        raise rewriter.ragged(node)
    picked = rewriter.gather(held, axis, index)
    inner = torch.from_numpy(back)[picked.labels]
    if not row.drops:
        return rewriter.retag(node, picked, inner)
    return rewriter.squeezed(node, picked, inner, axis)
