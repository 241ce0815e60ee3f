"""Windows laid out as columns, and columns summed back into an image (im2col, col2im).

A channel of the image is as many rows of the columns as a window has places, one after the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from narrows.ir.held import Held
from narrows.ir.labels import Ints, Value
from narrows.ir.meta import shape_of
from narrows.ir.ops.args import arguments, first_tensor
from narrows.ir.ops.barrier import barrier_flow
from narrows.ir.ops.flow import Flow, Read
from narrows.ir.ops.protocols import Builder, Channels
from narrows.ir.ops.row import Row, Shared, labels_along

SLIDES = "its windows slide over an axis that holds channels"


def _places(node: fx.Node) -> int:
    """Return how many places a window has."""
    return math.prod(arguments(node)["kernel_size"])


def _along(index: Ints, axis: int, rank: int) -> dict[int, torch.Tensor]:
    return {axis: torch.from_numpy(index).view([-1 if a == axis else 1 for a in range(rank)])}


@dataclass(frozen=True, kw_only=True)
class Columns(Row):
    """``unfold``: from ``[.., C, H, W]`` the columns ``[.., C * places, windows]``."""

    kind = "windows"
    work_kind: str = "copy"
    any_width: bool = False

    def flow(self, facts: Channels, node: fx.Node) -> Flow:
        x = first_tensor(node)
        source, axis = facts.value(x), len(shape_of(x)) - 3
        if set(source.axes) - {axis}:
            return barrier_flow(facts, node, SLIDES)
        labels = labels_along(source, axis)[0].expand(source.shape[axis])
        labels = labels.repeat_interleave(_places(node)) if source.axes else labels[:1]
        const = source.const
        if any(arguments(node)["padding"]):
            const = np.where(const == 0, 0.0, np.nan)
        shape = shape_of(node)
        tensor = labels.view([-1 if a == axis else 1 for a in range(len(shape))])
        return Flow(Value(shape, tensor, source.count, const), (Read(x, np.arange(source.count)),))

    def rewrite(self, rewriter: Builder, node: fx.Node) -> Held:
        if rewriter.facts.flows[node].barrier:
            return rewriter.whole(node)
        held, x = rewriter.operand(node, 0), first_tensor(node)
        where = rewriter.positions(x, held.places)
        if where is None:
            raise rewriter.ragged(node)
        axis, many, shape = len(shape_of(x)) - 3, _places(node), list(shape_of(node))
        shape[axis] = held.shape[axis] * many
        changes: dict[str, Any] = {"self": held.node}
        if axis not in where:
            return rewriter.emit(node, changes, rewriter.facts.value(node).places, tuple(shape))
        rows = (where[axis][:, None] * many + np.arange(many)).flatten()
        places = rewriter.facts.value(node).placed(_along(rows, axis, len(shape)))
        return rewriter.emit(node, changes, places, tuple(shape))


@dataclass(frozen=True, kw_only=True)
class Folded(Row):
    """``fold``: from columns ``[.., C * places, windows]`` the sums ``[.., C, H, W]``."""

    kind = "windows"
    work_kind: str = "reduce"

    def flow(self, facts: Channels, node: fx.Node) -> Flow:
        x = first_tensor(node)
        source, axis = facts.value(x), len(shape_of(x)) - 2
        if set(source.axes) - {axis}:
            return barrier_flow(facts, node, SLIDES)
        rows = labels_along(source, axis)[0].expand(source.shape[axis]).view(-1, _places(node))
        classes, index = torch.unique(rows, dim=0, return_inverse=True)
        count, width = classes.shape
        shape = shape_of(node)
        tensor = index.view([-1 if a == axis else 1 for a in range(len(shape))])
        pairs = (np.repeat(np.arange(count), width), classes.flatten().numpy())
        const = np.where((source.const[classes.numpy()] == 0).all(1), 0.0, np.nan)
        tensor = tensor if count > 1 else tensor.narrow(axis, 0, 1)
        value = Value(shape, tensor, count, const)
        return Flow(value, (Read(x, pairs=pairs, couples=False),))

    def shared(self, facts: Channels, node: fx.Node) -> Shared | None:
        pairs = facts.flows[node].reads[0].pairs
        if facts.flows[node].barrier or pairs is None:
            return None
        out, inp = pairs
        return Shared(first_tensor(node), inp, out, "the places of a window are summed")

    def rewrite(self, rewriter: Builder, node: fx.Node) -> Held:
        if rewriter.facts.flows[node].barrier:
            return rewriter.whole(node)
        held, x = rewriter.operand(node, 0), first_tensor(node)
        axis, many, value = len(shape_of(x)) - 2, _places(node), rewriter.facts.value(node)
        shape = list(shape_of(node))
        where = rewriter.positions(x, held.places)
        if where is None:
            raise rewriter.ragged(node)
        if axis not in where:
            return rewriter.emit(node, {"self": held.node}, value.places, tuple(shape))
        at = {row: position for position, row in enumerate(where[axis].tolist())}
        sums = [s for s in dict.fromkeys(row // many for row in at)
                if all(s * many + place in at for place in range(many))]  # fmt: skip
        order = [at[s * many + place] for s in sums for place in range(many)]
        held = rewriter.gather(held, axis, np.asarray(order, dtype=np.int64))
        shape[axis] = len(sums)
        places = value.placed(_along(np.asarray(sums, dtype=np.int64), axis, len(shape)))
        return rewriter.emit(node, {"self": held.node}, places, tuple(shape))
