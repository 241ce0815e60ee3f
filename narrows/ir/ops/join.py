"""Operators that put tensors side by side: cat and stack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from narrows.ir.labels import Value, channels, compact, is_count, merge, number, some, unknown
from narrows.ir.ops.args import arguments
from narrows.ir.ops.barrier import barrier_flow
from narrows.ir.ops.constants import constants_of
from narrows.ir.ops.row import Flow, Read, Row
from narrows.ir.program import shape_of

if TYPE_CHECKING:
    from narrows.ir.channels import Facts
    from narrows.ir.rewrite import Held, Rewriter


@dataclass(frozen=True, kw_only=True)
class Join(Row):
    """``cat`` and ``stack``: several tensors side by side along one axis.

    Attributes:
        stacks: Whether the axis is new.
    """

    kind = "join"
    stacks: bool = False

    def flow(self, facts: Facts, node: fx.Node) -> Flow:
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
    def _aside(facts: Facts, bound: list[fx.Node]) -> bool:
        return any(facts.value(n).count > 1 for n in bound)

    @staticmethod
    def _beside(facts: Facts, node: fx.Node, operands: list[fx.Node], bound: list[fx.Node]) -> Flow:
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

    def _along(self, facts: Facts, node: fx.Node, operands: list[fx.Node], axis: int) -> Flow:
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
    def _labelled(facts: Facts, node: fx.Node, axis: int) -> Value:
        if not facts.is_free(node):
            return facts.value(node)
        value = channels(shape_of(node), axis)
        value.const = constants_of(facts.data(node), value)
        return value

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> Held:
        facts = rewriter.facts
        args = arguments(node)
        axis = args["dim"] % len(shape_of(node))
        if facts.flows[node].facts == "beside":
            held, labels, shape = rewriter.aligned(node, skip_axis=axis)
            feed = iter(held)
            tensors = [
                rewriter.sliced_free(node, n, labels) if facts.is_free(n) else next(feed)
                for n in args["tensors"]
            ]
            shape = (*shape[:axis], shape_of(node)[axis], *shape[axis + 1 :])
            return rewriter.emit(node, {"tensors": tensors}, labels, shape)
        return self._rewrite_along(rewriter, node, axis)

    def _rewrite_along(self, rewriter: Rewriter, node: fx.Node, axis: int) -> Held:
        facts = rewriter.facts
        spans, origin = facts.flows[node].facts
        value = facts.value(node)
        back: np.ndarray | None = None  # where every operand's labels are the result's, in order
        if not is_count(origin):
            back = np.full(int(origin.max()) + 1, -1)
            back[origin] = np.arange(len(origin))
        need = rewriter.need(node)
        kept = {axis, *value.axes}
        tensors: list[fx.Node] = []
        parts: list[Tensor] = []
        shapes: list[tuple[int, ...]] = []
        slot = 0
        for n, start, count in spans:
            bound = not facts.is_free(n)
            slot += bound
            inside: Any = slice(start, start + count)
            if back is not None:
                inside = (origin >= start) & (origin < start + count)
            mine = need[inside]
            if not some(mine):
                continue
            if bound:
                held = rewriter.operand(node, slot - 1)
                labels, shape, new = held.labels, held.shape, held.node
            else:
                keep = origin[inside][mine] - start
                labels = torch.from_numpy(keep).view(_along_axis(axis, len(value.shape)))
                shape = tuple(len(keep) if a == axis else s for a, s in enumerate(shape_of(n)))
                new = rewriter.free(n, {axis: keep})
            local = labels + start if back is None else torch.from_numpy(back)[labels + start]
            if self.stacks:
                local, shape = local.unsqueeze(axis), (*shape[:axis], 1, *shape[axis:])
            tensors.append(new)
            shapes.append(shape)
            parts.append(_only(local, kept, shape))
        rank = rewriter.choices.order.get(node.name)
        if rank is not None:  # the operands' order is free, too
            first = [int(rank[p.flatten().numpy()].min()) for p in parts]
            order = sorted(range(len(parts)), key=first.__getitem__)
            tensors, parts = [tensors[i] for i in order], [parts[i] for i in order]
            shapes = [shapes[i] for i in order]
        shape = tuple(
            sum(s[a] for s in shapes) if a == axis else max(s[a] for s in shapes)
            for a in range(len(value.shape))
        )
        if len(parts) == 1 and not self.stacks:
            return rewriter.retag_node(tensors[0], rewriter.trim(parts[0], value), shape)
        widest = [max(p.shape[a] for p in parts) for a in range(len(shape))]
        try:
            parts = [
                p.expand([-1 if a == axis else s for a, s in enumerate(widest)]) for p in parts
            ]
            result = torch.cat(parts, axis)
        except RuntimeError:
            raise rewriter.ragged(node) from None
        return rewriter.emit(node, {"tensors": tensors}, rewriter.trim(result, value), shape)


def _along_axis(axis: int, rank: int) -> list[int]:
    return [-1 if a == axis else 1 for a in range(rank)]


def _only(tensor: Tensor, axes: set[int], shape: tuple[int, ...]) -> Tensor:
    """Return labels with the size of ``shape`` along ``axes``, and of one element along others."""
    for axis, size in enumerate(tensor.shape):
        if axis not in axes and size > 1:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor.expand([size if axis in axes else 1 for axis, size in enumerate(shape)])
