"""Operators that take elements from where a computed index says: gather, scatter, indexing, grids.

Along the axes that the index chooses on they read whatever it names; along every other axis a
result channel is the operand's. Where channels lie on an axis that is chosen on, none can go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from narrows.ir.held import Held
from narrows.ir.labels import Value, broadcast, merge, unknown
from narrows.ir.meta import Meta, shape_of
from narrows.ir.ops.args import arguments, first_tensor, is_tensor
from narrows.ir.ops.barrier import barrier_flow
from narrows.ir.ops.flow import Flow, Read
from narrows.ir.ops.layout import carried, moved
from narrows.ir.ops.mixing import Spatial
from narrows.ir.ops.protocols import Builder, Channels, Needs
from narrows.ir.ops.row import Row, Shared

AT_RUN_TIME = "which channels it takes is computed at run time"


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if is_tensor(n)]


class Picking(Row):
    """An operator whose first operand holds the elements, while the others say where they go."""

    def demand(self, demand: Needs, node: fx.Node) -> None:
        x = first_tensor(node)
        need, valued = demand.needed(node), demand.valued(node)
        for slot, read in enumerate(demand.facts.flows[node].reads):
            count = demand.facts.value(read.operand).count
            # An index that only filled a place could point beside the operand.
            weighs = valued if read.operand is x else need
            demand.require(node, slot, read.reached(need, count), read.reached(weighs, count))


@dataclass(frozen=True, kw_only=True)
class Gather(Picking):
    """``y[i, j, c] = x[i, index[i, j, c], c]``, or the like written into a copy of ``x`` (scatter).

    Attributes:
        axis: The argument that names the axis that is chosen on.
        picks: Whether every element of the result is one of ``x``.
    """

    kind = "picking"
    passes_on = True
    broadcasts = True
    work_kind: str = "gather"
    axis: str = "dim"
    picks: bool = True

    def flow(self, facts: Channels, node: fx.Node) -> Flow:
        shape, axis = shape_of(node), self._axis(node)
        computed = [n for n in _tensors(node) if not facts.is_free(n)]
        if axis is None or any(axis in facts.value(n).axes for n in computed):
            return barrier_flow(facts, node, AT_RUN_TIME)
        if any(_beside(shape_of(n), axis) != _beside(shape, axis) for n in _tensors(node)):
            return barrier_flow(facts, node, "its index does not span its operand")
        labels, count, sources = merge([facts.value(n) for n in computed], len(shape))
        value = Value(shape, labels, count, unknown(count))
        x = first_tensor(node)
        if self.picks and x in computed:
            value.const = facts.value(x).const[sources[computed.index(x)]]
        return Flow(value, tuple(Read(n, s) for n, s in zip(computed, sources, strict=True)))

    def _axis(self, node: fx.Node) -> int | None:
        """Return the axis that is chosen on; ``None`` where all of them are."""
        axis = arguments(node)[self.axis]
        return axis % max(1, len(shape_of(node))) if isinstance(axis, int) else None

    def input_axis(self, node: fx.Node, operand: fx.Node) -> int | str | None:
        return "same"

    def rewrite(self, rewriter: Builder, node: fx.Node) -> Held:
        axis = self._axis(node)
        if rewriter.facts.flows[node].barrier or axis is None:
            return rewriter.whole(node)
        held, places, shape = rewriter.aligned(node, skip_axis=axis)
        reads = rewriter.facts.flows[node].reads
        replaced = {read.operand: held[slot] for slot, read in enumerate(reads)}
        for n in _tensors(node):
            if rewriter.facts.is_free(n):
                replaced[n] = rewriter.sliced_free(node, n, places)
                own = [1 if a == axis else s for a, s in enumerate(shape_of(replaced[n]))]
                shape = broadcast((shape, tuple(own)))
        sizes = tuple(shape_of(node)[a] if a == axis else s for a, s in enumerate(shape))
        return rewriter.emit_mapped(node, replaced, places, sizes)


def _beside(shape: tuple[int, ...], axis: int) -> list[int]:
    return [size for a, size in enumerate(shape) if a != axis]


class Guided(Picking):
    """One whose first operand keeps its channels while the others are read whole."""

    def _guides(self, facts: Channels, first: fx.Node, node: fx.Node, count: int) -> list[Read]:
        """Return what each of ``count`` result channels reads of the others: all of it."""
        found = []
        for n in _tensors(node):
            if n is not first and not facts.is_free(n):
                width = facts.value(n).count
                pairs = np.arange(count).repeat(width), np.tile(np.arange(width), count)
                found.append(Read(n, pairs=pairs, couples=False))
        return found

    def shared(self, facts: Channels, node: fx.Node) -> Shared | None:
        for read in facts.flows[node].reads[1:]:
            labels = np.arange(facts.value(read.operand).count)
            return Shared(read.operand, labels, np.zeros_like(labels), "they say where to read")
        return None

    def _led(self, rewriter: Builder, node: fx.Node) -> dict[fx.Node, fx.Node]:
        """Return the new node of each operand but the first, which are whole."""
        reads = rewriter.facts.flows[node].reads[1:]
        new = {read.operand: rewriter.entire(node, read.operand).node for read in reads}
        first = first_tensor(node)
        free = [n for n in _tensors(node) if n is not first and n not in new]
        return {**new, **{n: rewriter.plain(n) for n in free}}


@dataclass(frozen=True, kw_only=True)
class Indexed(Guided):
    """``x[:, :, i, j]``: axes picked from by index tensors, which are whole."""

    kind = "picking"
    work_kind: str = "copy"

    def flow(self, facts: Channels, node: fx.Node) -> Flow:
        given, x = arguments(node), first_tensor(node)
        if facts.is_free(x):
            return barrier_flow(facts, node, "it looks up rows of a weight")
        if any(Meta(n).dtype in (torch.bool, torch.uint8) for n in _tensors(node) if n is not x):
            return barrier_flow(facts, node, "how much it takes is computed at run time")
        source = facts.value(x)
        chosen = {axis for axis, index in enumerate(given["indices"]) if index is not None}
        if chosen & set(source.axes):
            return barrier_flow(facts, node, AT_RUN_TIME)
        value, origin = moved(source, self._run(node, carried(source)))
        guides = self._guides(facts, x, node, value.count)
        return Flow(value, (Read(x, origin), *guides))

    def _run(self, node: fx.Node, x: torch.Tensor) -> torch.Tensor:
        """Run the operator on labels, which are the same wherever the index points."""
        listed = arguments(node)["indices"]
        first = [n if n is None else torch.zeros(shape_of(n), dtype=torch.int64) for n in listed]
        run: Any = node.target
        return run(x, first)

    def rewrite(self, rewriter: Builder, node: fx.Node) -> Held:
        if rewriter.facts.flows[node].barrier:
            return rewriter.whole(node)
        held, x = rewriter.operand(node, 0), first_tensor(node)
        result = self._run(node, held.places.expand(held.shape))
        value = rewriter.facts.value(node)
        came = self._run(node, rewriter.facts.value(x).places.expand(shape_of(x)))
        places = _carried(rewriter, node, value, came, result)
        replaced = {x: held.node, **self._led(rewriter, node)}
        return rewriter.emit_mapped(node, replaced, places, tuple(result.shape))


def _carried(
    rewriter: Builder, node: fx.Node, value: Value, came: torch.Tensor, now: torch.Tensor
) -> torch.Tensor:
    """Return the places of a result whose elements came from ``came`` and now from ``now``."""
    index = {}
    for axis in value.axes:
        before = came.movedim(axis, 0).flatten(1)[:, 0].tolist()
        after = now.movedim(axis, 0).flatten(1)[:, 0].tolist()
        if len(set(before)) != len(before) or not set(after) <= set(before):
            raise rewriter.ragged(node)
        view = [-1 if a == axis else 1 for a in range(now.dim())]
        index[axis] = torch.tensor([before.index(p) for p in after]).view(view)
    return value.placed(index)


@dataclass(frozen=True, kw_only=True)
class Sampled(Guided, Spatial):
    """``grid_sample``: each channel read between its pixels, where a grid says."""

    kind = "spatial"

    def axes(self, node: fx.Node, rank: int) -> set[int]:
        return set(range(2, rank))

    def flow(self, facts: Channels, node: fx.Node) -> Flow:
        x = first_tensor(node)
        if facts.is_free(x):
            return barrier_flow(facts, node, "it reads a weight")
        source = facts.value(x)
        if set(source.axes) - {1}:
            return barrier_flow(facts, node, AT_RUN_TIME)
        const = np.where(source.const == 0, 0.0, np.nan)
        value = Value(shape_of(node), source.labels, source.count, const)
        guides = self._guides(facts, x, node, source.count)
        return Flow(value, (Read(x, np.arange(source.count)), *guides))

    def rewrite(self, rewriter: Builder, node: fx.Node) -> Held:
        if rewriter.facts.flows[node].barrier:
            return rewriter.whole(node)
        held = rewriter.operand(node, 0)
        replaced = {first_tensor(node): held.node, **self._led(rewriter, node)}
        shape = (*held.shape[:2], *shape_of(node)[2:])
        return rewriter.emit_mapped(node, replaced, held.places, shape)
