"""Operators that take a part of an axis: slice, select, split, index_select."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from narrows.ir.held import Held
from narrows.ir.labels import Ints, Value, match, opaque
from narrows.ir.meta import shape_of
from narrows.ir.ops.args import arguments, call, first_tensor
from narrows.ir.ops.barrier import barrier_flow
from narrows.ir.ops.flow import Flow, Read
from narrows.ir.ops.layout import carried, moved
from narrows.ir.ops.protocols import Builder, Channels
from narrows.ir.ops.row import Row


@dataclass(frozen=True, kw_only=True)
class Selection(Row):
    """``y`` is a part of ``x`` along one axis: slice, select, split, index_select.

    Attributes:
        drops: Whether the axis itself goes away (select).
        axis: The argument that names the axis.
    """

    kind = "selection"
    rearranges = True
    work_kind: str = "slice"
    drops: bool = False
    axis: str = "dim"

    def flow(self, facts: Channels, node: fx.Node) -> Flow:
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
        origins = [o for _, o in parts]
        return Flow(tuple(v for v, _ in parts), facts=Parts(self, x, origins))

    def rewrite(self, rewriter: Builder, node: fx.Node) -> Held:
        return take(rewriter, node, node, self)


@dataclass(frozen=True)
class Parts:
    """What a selection with several results has split.

    Attributes:
        row: The selection's row.
        operand: What it selects from.
        origins: Per result and label, the operand's label.
    """

    row: Selection
    operand: fx.Node
    origins: list[Ints]


@dataclass(frozen=True, kw_only=True)
class Item(Row):
    """``getitem`` on the result of a split: a selection from the split's own input."""

    kind = "selection"
    rearranges = True
    work_kind: str = "slice"

    @property
    def name(self) -> str:
        """The function's name."""
        return "getitem"

    def flow(self, facts: Channels, node: fx.Node) -> Flow:
        parent: Any
        parent, index = node.args
        assert isinstance(index, int)
        flow = facts.flows[parent]
        if flow.barrier:
            return Flow(opaque(shape_of(node)), flow.reads, flow.barrier)
        parts: Parts = flow.facts
        return Flow(flow.value[index], (Read(parts.operand, parts.origins[index]),))

    def rewrite(self, rewriter: Builder, node: fx.Node) -> Held:
        parent: Any = node.args[0]
        parts = rewriter.facts.flows[parent].facts
        if not isinstance(parts, Parts):
            return rewriter.whole(node)
        return take(rewriter, node, parent, parts.row)


def _first(part: Tensor, axis: int) -> Tensor:
    """Return the first number at each index of an axis."""
    return part.movedim(axis, 0).reshape(part.shape[axis], -1)[:, 0]


def take(rewriter: Builder, node: fx.Node, call_node: fx.Node, row: Selection) -> Held:
    """Emit the selection of ``node`` by positions of what its operand now holds."""
    facts = rewriter.facts
    value, x = facts.value(node), facts.moved_operand(node)
    source = facts.value(x)
    axis = arguments(call_node)[row.axis] % len(source.shape)
    alone = source.axes == (axis,)
    held = rewriter.held(x) if alone else rewriter.operand(node, 0)
    ruler = torch.arange(source.shape[axis]).view(
        [-1 if a == axis else 1 for a in range(len(source.shape))]
    )
    part = call(call_node, {x: ruler.expand(source.shape), **rewriter.free_data(call_node)})
    part = part if isinstance(part, Tensor) else part[node.args[1]]
    asked = (part.reshape(-1)[:1] if row.drops else _first(part, axis)).numpy()
    whole = rewriter.need(node).all() and not rewriter.narrowed(x, held.places)
    if whole or axis not in source.axes:
        same = _as_it_is(rewriter, node, call_node, held)
        if not row.drops:
            rewriter.turns(same.node, held, axis, asked)
        return same
    chosen = _chosen(rewriter, node, row, axis, held, asked)
    if chosen is None:  # channels on several axes, entangled: it must be just what is asked for
        chosen = held, _inward(rewriter, node, held)
    picked, places = chosen
    if not row.drops:
        return rewriter.retag(node, picked.node, rewriter.trim(places, value), picked.shape)
    if picked.shape[axis] != 1:
        raise rewriter.ragged(node)
    return rewriter.squeezed(node, picked, places, axis)


def _inward(rewriter: Builder, node: fx.Node, held: Held) -> Tensor:
    """Return the result's places for an operand that holds nothing else."""
    came = rewriter.facts.came(node).flatten().numpy()
    back = np.full(rewriter.facts.value(rewriter.facts.moved_operand(node)).tensor.numel(), -1)
    back[came] = np.arange(len(came))
    places = torch.from_numpy(back)[held.places]
    single = len(np.unique(came)) == len(came) == rewriter.facts.value(node).tensor.numel()
    if not single or bool((places < 0).any()):
        raise rewriter.ragged(node)
    return places


def _chosen(
    rewriter: Builder, node: fx.Node, row: Selection, axis: int, held: Held, asked: Ints
) -> tuple[Held, Tensor] | None:
    """Return the needed ones of the original indices ``asked`` of an axis, and their places, the
    axis still there; ``None`` where indices depend on other axes."""
    facts = rewriter.facts
    x, value = facts.moved_operand(node), facts.value(node)
    where = rewriter.positions(x, held.places)
    if where is None:
        return None
    wanted = np.arange(len(asked))
    if not row.drops and value.tensor.shape[axis] > 1:
        wanted = rewriter.wanted(node, axis)
    index = match(where[axis], asked[wanted])
    if index is None:
        raise rewriter.ragged(node)
    picked = rewriter.gather(held, axis, index)
    rank = len(picked.shape)
    lines = {**where, axis: wanted}
    views = {a: [-1 if b == a else 1 for b in range(rank)] for a in lines}
    index_of = {a: torch.from_numpy(i.copy()).view(views[a]) for a, i in lines.items()}
    return picked, _placed(value, index_of, axis if row.drops else None, rank)


def _placed(value: Value, index: dict[int, Tensor], dropped: int | None, rank: int) -> Tensor:
    """Return the places of a result for indices along its operand's axes, of which one may be
    dropped."""
    if dropped is None:
        return value.placed(index)
    kept = {a - (a > dropped): i.squeeze(dropped) for a, i in index.items() if a != dropped}
    places = value.placed(kept)
    return places.unsqueeze(dropped) if value.axes else places.new_zeros([1] * rank)


def _as_it_is(rewriter: Builder, node: fx.Node, call_node: fx.Node, held: Held) -> Held:
    first = next(iter(arguments(call_node)))
    shown = held.places.expand(held.shape)
    result = rewriter.preview(call_node, {first: shown}, rewriter.free_data(call_node))
    if node is call_node:
        places = rewriter.carried(node, held, result)
        return rewriter.emit(node, {first: held.node}, places, tuple(result.shape))
    result = result[node.args[1]]
    places = rewriter.carried(node, held, result)
    return rewriter.item(node, call_node, held, places, tuple(result.shape))
