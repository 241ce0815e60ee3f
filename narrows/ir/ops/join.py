"""Operators that put tensors side by side: cat and stack."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from narrows.ir.held import Held
from narrows.ir.labels import Value, channels, compact, merge, number, unknown
from narrows.ir.meta import shape_of
from narrows.ir.ops.args import arguments
from narrows.ir.ops.barrier import barrier_flow
from narrows.ir.ops.constants import constants_of
from narrows.ir.ops.flow import Flow, Read
from narrows.ir.ops.protocols import Builder, Channels
from narrows.ir.ops.row import Row


@dataclass(frozen=True, kw_only=True)
class Join(Row):
    """``cat`` and ``stack``: several tensors side by side along one axis.

    Attributes:
        stacks: Whether the axis is new.
    """

    kind = "join"
    concatenates = True
    work_kind: str = "concat"
    stacks: bool = False

    def flow(self, facts: Channels, node: fx.Node) -> Flow:
        args = arguments(node)
        shape = shape_of(node)
        axis = args["dim"] % len(shape)
        operands = [
            n for n in args["tensors"] if len(shape_of(n) or ()) == len(shape) - self.stacks
        ]
        if len(operands) != len(args["tensors"]):  # the legacy empty tensor
            return barrier_flow(facts, node, "it joins tensors of different rank")
        bound = [n for n in operands if not facts.is_free(n)]
        if self.stacks and len(bound) < len(operands):
            return barrier_flow(facts, node, "it stacks weights on what is computed")
        if (
            not self.stacks
            and not any(axis in facts.value(n).axes for n in bound)
            and self._aside(facts, bound)
        ):
            return self._beside(facts, node, operands, bound)
        return self._along(facts, node, operands, axis)

    @staticmethod
    def _aside(facts: Channels, bound: list[fx.Node]) -> bool:
        return any(facts.value(n).count > 1 for n in bound)

    @staticmethod
    def _beside(
        facts: Channels, node: fx.Node, operands: list[fx.Node], bound: list[fx.Node]
    ) -> Flow:
        # The channels lie on another axis (tokens are joined): each is the same channel of every
        # operand.
        shape = shape_of(node)
        values = [facts.value(n) for n in bound]
        labels, count, sources = merge(values, len(shape))
        value = Value(shape, labels, count, unknown(count))
        known = [v.const[s] for v, s in zip(values, sources, strict=True)]
        known += [constants_of(facts.data(n), value) for n in operands if facts.is_free(n)]
        first = known[0]
        same = np.all([k == first for k in known], axis=0)
        value.const = np.where(same, first, np.nan)
        return Flow(
            value, tuple(Read(n, s) for n, s in zip(bound, sources, strict=True)), facts="beside"
        )

    def _along(self, facts: Channels, node: fx.Node, operands: list[fx.Node], axis: int) -> Flow:
        shape = shape_of(node)
        parts, consts, spans, start = [], [], [], 0
        for n in operands:
            value = self._labelled(facts, n, axis)
            tensor = (value.tensor + start).expand(value.shape)
            parts.append(tensor.unsqueeze(axis) if self.stacks else tensor)
            consts.append(value.const)
            spans.append((n, start, value.count))
            start += value.count
        rank = range(len(shape))
        wide = {a for p in parts for a in rank if a != axis and p.stride(a) != 0 and p.shape[a] > 1}
        parts = [_only(p, wide | {axis}, tuple(p.shape)) for p in parts]
        labels, origin = number(compact(torch.cat(parts, axis)))
        value = Value(shape, labels, len(origin), np.concatenate(consts)[origin])
        reads = []
        for n, first, count in spans:
            if facts.is_free(n):
                continue
            inside = (origin >= first) & (origin < first + count)
            reads.append(Read(n, np.where(inside, origin - first, -1)))
        return Flow(value, tuple(reads), facts=(spans, origin))

    @staticmethod
    def _labelled(facts: Channels, node: fx.Node, axis: int) -> Value:
        if not facts.is_free(node):
            return facts.value(node)
        value = channels(shape_of(node), axis)
        value.const = constants_of(facts.data(node), value)
        return value

    def rewrite(self, rewriter: Builder, node: fx.Node) -> Held:
        facts = rewriter.facts
        args = arguments(node)
        axis = args["dim"] % len(shape_of(node))
        if facts.flows[node].facts == "beside":
            held, places, shape = rewriter.aligned(node, skip_axis=axis)
            feed = iter(held)
            tensors = [
                rewriter.sliced_free(node, n, places) if facts.is_free(n) else next(feed)
                for n in args["tensors"]
            ]
            shape = (*shape[:axis], shape_of(node)[axis], *shape[axis + 1 :])
            return rewriter.emit(node, {"tensors": tensors}, places, shape)
        return self._rewrite_along(rewriter, node, axis)

    def _rewrite_along(self, rewriter: Builder, node: fx.Node, axis: int) -> Held:
        value = rewriter.facts.value(node)
        rank = len(value.shape)
        stands = [a for a in range(rank) if not (self.stacks and a == axis)]
        blocks = self._blocks(rewriter, node, axis)
        bound = [
            (n, rewriter.operand(node, slot), stands) for n, _, slot in blocks if slot is not None
        ]
        beside = [a for a in value.axes if a != axis]
        sides = rewriter.sides(node, bound, rank, value.axes, beside)
        lines = {a: rewriter.wanted(node, a) for a in ([] if sides else beside)}
        common = {a: s.index[a] for s in sides[:1] for a in beside} or {
            a: torch.from_numpy(i).view(_along_axis(a, rank)) for a, i in lines.items()
        }
        feed, tensors, places, shapes = iter(sides), [], [], []
        for n, start, slot in blocks:
            if slot is None:
                new, shape, along = self._weights(rewriter, node, n, start, axis, common)
            else:
                side = next(feed)
                new, shape = side.held.node, side.held.shape
                along = side.index.get(axis, torch.zeros([1] * rank, dtype=torch.int64))
                shape = (*shape[:axis], 1, *shape[axis:]) if self.stacks else shape
            tensors.append(new)
            shapes.append(shape)
            places.append(value.placed({**common, axis: along + start}))
        rank_of = rewriter.order.get(node.name)
        if rank_of is not None:  # the operands' order is free, too
            first = [int(rank_of[value.at(p).flatten().numpy()].min()) for p in places]
            order = sorted(range(len(places)), key=first.__getitem__)
            tensors, places = [tensors[i] for i in order], [places[i] for i in order]
            shapes = [shapes[i] for i in order]
        shape = tuple(
            sum(s[a] for s in shapes) if a == axis else size for a, size in enumerate(shapes[0])
        )
        if len(places) == 1 and not self.stacks:
            return rewriter.retag(node, tensors[0], places[0], shape)
        joined = torch.cat(places, axis) if axis in value.axes else places[0]
        return rewriter.emit(node, {"tensors": tensors}, joined, shape)

    def _blocks(
        self, rewriter: Builder, node: fx.Node, axis: int
    ) -> list[tuple[fx.Node, int, int | None]]:
        """Return the operands of which anything is needed: each with where it starts along the
        axis and its slot, ``None`` for what is made of weights."""
        facts = rewriter.facts
        spans, _ = facts.flows[node].facts
        wanted = rewriter.wanted(node, axis)
        labelled = axis in facts.value(node).axes
        found: list[tuple[fx.Node, int, int | None]] = []
        start, slot = 0, 0
        for n, _, _ in spans:
            width = 1 if self.stacks else shape_of(n)[axis]
            bound = not facts.is_free(n)
            if width and (not labelled or ((wanted >= start) & (wanted < start + width)).any()):
                found.append((n, start, slot if bound else None))
            start, slot = start + width, slot + bound
        return found

    @staticmethod
    def _weights(
        rewriter: Builder, node: fx.Node, n: fx.Node, start: int, axis: int,
        common: dict[int, Tensor],
    ) -> tuple[fx.Node, tuple[int, ...], Tensor]:  # fmt: skip
        """Return an operand made of weights with the indices that are needed of it."""
        shape, wanted = shape_of(n), rewriter.wanted(node, axis)
        index = {a: rewriter.line(node, i, a) for a, i in common.items()}
        if axis in rewriter.facts.value(node).axes:
            index[axis] = wanted[(wanted >= start) & (wanted < start + shape[axis])] - start
        kept = index.get(axis, np.zeros(1, dtype=np.int64))
        along = torch.from_numpy(kept).view(_along_axis(axis, len(shape)))
        shape = tuple(len(index[a]) if a in index else s for a, s in enumerate(shape))
        return rewriter.free(n, index), shape, along


def _along_axis(axis: int, rank: int) -> list[int]:
    return [-1 if a == axis else 1 for a in range(rank)]


def _only(tensor: Tensor, axes: set[int], shape: tuple[int, ...]) -> Tensor:
    """Return labels with the size of ``shape`` along ``axes``, and of one element along others."""
    for axis, size in enumerate(tensor.shape):
        if axis not in axes and size > 1:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor.expand([size if axis in axes else 1 for axis, size in enumerate(shape)])
