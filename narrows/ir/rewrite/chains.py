"""Chains of layout operators whose intermediate tensors would be ragged.

Splitting an axis of arbitrary kept channels into factors (heads, shuffle groups) gives no
rectangle. Two ways out need no more channels: emit the chain anew on just the channels its end
needs, or emit it as the one gather that it amounts to.
"""

from __future__ import annotations

import operator
from typing import Any, Protocol

import numpy as np
import torch
from torch import fx

from narrows.ir.held import Held, RaggedError, evened
from narrows.ir.labels import Bools, Ints, match
from narrows.ir.ops import table
from narrows.ir.ops.args import arguments, call
from narrows.ir.ops.protocols import Builder


class Chaining(Builder, Protocol):
    """What it takes to emit a chain anew.

    Attributes:
        virtual: Layout nodes that have no tensor of their own, each with the reason.
        given: While a chain is emitted anew, what its nodes are to work on.
    """

    virtual: dict[fx.Node, RaggedError]
    given: dict[fx.Node, tuple[Held, Bools]]


def replay(rewriter: Chaining, node: fx.Node, mask: Bools) -> Held:
    """Emit a chain of layout operators anew, on just the channels that its end needs."""
    row = table.find(node)
    if row is None or not row.rearranges:
        raise RaggedError(node, None)
    read = rewriter.facts.flows[node].reads[0]
    inner = read.reached(mask, rewriter.facts.value(read.operand).count)
    if read.operand in rewriter.virtual:
        if np.array_equal(inner, rewriter.need(read.operand)):  # tried before, in vain
            raise _carried(rewriter, node, rewriter.virtual[read.operand])
        try:
            given = replay(rewriter, read.operand, inner)
        except RaggedError as failure:
            raise _carried(rewriter, node, failure) from None
    else:
        given = rewriter.deliver(read.operand, inner)
    before = rewriter.given.get(node)
    rewriter.given[node] = (given, mask)
    try:
        return row.rewrite(rewriter, node)
    finally:
        if before is None:
            del rewriter.given[node]
        else:
            rewriter.given[node] = before


def _carried(rewriter: Chaining, node: fx.Node, failure: RaggedError) -> RaggedError:
    """Say what a failure at the operand means for ``node``: the end of a chain must ask for
    more."""
    read = rewriter.facts.flows[node].reads[0]
    if failure.node is not read.operand or failure.mask is None or read.source is None:
        return RaggedError(node, None)
    return RaggedError(node, evened(rewriter.facts.value(read.operand), failure.mask)[read.source])


def collapse(rewriter: Chaining, node: fx.Node, mask: Bools) -> Held:
    """Emit a chain of layout operators as one gather, where that is what it amounts to."""
    value = rewriter.facts.value(node)
    if len(value.axes) != 1:
        raise RaggedError(node, None)
    (axis,) = value.axes
    chain, position = [node], np.arange(value.tensor.numel())
    root = node
    while root in rewriter.virtual or root is node:
        row = table.find(root)
        if row is None or not row.rearranges:
            raise RaggedError(node, None)
        came = rewriter.facts.came(root)
        if came.numel() != rewriter.facts.value(root).tensor.numel():
            raise RaggedError(node, None)
        position, root = came.flatten().numpy()[position], rewriter.facts.moved_operand(root)
        chain.append(root)
    source = rewriter.facts.value(root)
    if source.axes != (axis,) or len(source.shape) != len(value.shape):
        raise RaggedError(node, None)
    if not _is_gather(rewriter, chain, axis, position):
        raise RaggedError(node, None)
    held = rewriter.held(root)
    wanted = mask[value.tensor.flatten().numpy()]
    where = rewriter.positions(root, held.places)
    index = None if where is None else match(where[axis], position[wanted])
    if index is None:
        raise RaggedError(node, None)
    picked = rewriter.gather(held, axis, index)
    places = torch.from_numpy(np.flatnonzero(wanted)).view(picked.places.shape)
    return rewriter.retag(node, picked.node, places, picked.shape)


def _is_gather(rewriter: Chaining, chain: list[fx.Node], axis: int, position: Ints) -> bool:
    """Whether the chain, run on the element numbers of its root, equals one gather along
    ``axis``."""
    root = chain[-1]
    shape = rewriter.facts.value(root).shape
    ids = torch.arange(int(np.prod(shape))).view(shape)
    result: Any = ids
    for node in reversed(chain[:-1]):
        split = node.args[0] if node.target is operator.getitem else node
        assert isinstance(split, fx.Node)
        result = call(split, {_operand(split): result, **rewriter.free_data(split)})
        result = result if split is node else result[node.args[1]]
    return torch.equal(result, ids.index_select(axis, torch.from_numpy(position)))


def _operand(node: fx.Node) -> fx.Node:
    first = next(iter(arguments(node).values()))
    assert isinstance(first, fx.Node)
    return first
