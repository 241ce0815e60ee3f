"""Operators with several results, each channel for itself: sorting, the k largest, medians."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from narrows.ir.held import Held
from narrows.ir.labels import Value, opaque, unknown
from narrows.ir.meta import shape_of
from narrows.ir.ops.args import arguments, call, first_tensor
from narrows.ir.ops.barrier import barrier_flow
from narrows.ir.ops.flow import Flow, Read
from narrows.ir.ops.mixing import Spatial
from narrows.ir.ops.protocols import Builder, Channels
from narrows.ir.ops.row import Row


@dataclass(frozen=True, kw_only=True)
class Ranked(Spatial):
    """Values in an order, or one of them, and where they were: ``sort``, ``topk``, ``max.dim``.

    The first result holds elements of the operand, the others their indices.
    """

    kind = "ranking"
    work_kind: str = "reduce"
    any_width: bool = False  # nobody asked yet

    def flow(self, facts: Channels, node: fx.Node) -> Flow:
        x = first_tensor(node)
        source = facts.value(x)
        if self.axes(node, len(source.shape)) & set(source.axes):
            return barrier_flow(facts, node, "which of the channels come first is computed")
        results = call(node, {x: torch.empty(source.shape, device="meta")})
        labels = self.cut(node, source.tensor)
        const = [source.const, *[unknown(source.count)] * (len(results) - 1)]
        values = tuple(
            Value(tuple(result.shape), labels, source.count, known)
            for result, known in zip(results, const, strict=True)
        )
        return Flow(values, facts=(self, x))

    def cut(self, node: fx.Node, labels: Tensor) -> Tensor:
        """Return labels without the axis that goes away, if one does."""
        if arguments(node).get("keepdim", True):
            return labels
        gone = self.axes(node, labels.dim())
        return labels.reshape([s for a, s in enumerate(labels.shape) if a not in gone])

    def rewrite(self, rewriter: Builder, node: fx.Node) -> Held:
        return rewriter.whole(node)


@dataclass(frozen=True, kw_only=True)
class Result(Row):
    """``getitem`` on an operator with several results: its channels are the operand's."""

    kind = "ranking"
    passes_on = True

    @property
    def name(self) -> str:
        """The function's name."""
        return "getitem"

    def flow(self, facts: Channels, node: fx.Node) -> Flow:
        parent, index = _parent(node)
        flow = facts.flows[parent]
        if flow.barrier:
            return Flow(opaque(shape_of(node)), flow.reads, flow.barrier)
        value: Value = flow.value[index]
        _, x = flow.facts
        return Flow(value, (Read(x, np.arange(value.count)),))

    def input_axis(self, node: fx.Node, operand: fx.Node) -> int | str | None:
        return "same"

    def rewrite(self, rewriter: Builder, node: fx.Node) -> Held:
        parent, index = _parent(node)
        if rewriter.facts.flows[node].barrier:
            return rewriter.whole(node)
        row: Ranked = rewriter.facts.flows[parent].facts[0]
        held = rewriter.operand(node, 0)
        axes = row.axes(parent, len(held.shape))
        full = rewriter.facts.flows[parent].value[index].shape
        if row.cut(parent, held.places).dim() < len(held.shape):
            shape = tuple(s for a, s in enumerate(held.shape) if a not in axes)
        else:
            shape = tuple(full[a] if a in axes else s for a, s in enumerate(held.shape))
        return rewriter.item(node, parent, held, row.cut(parent, held.places), shape)


RESULT = Result(target=operator.getitem, summary="one of several results")


def _parent(node: fx.Node) -> tuple[fx.Node, int]:
    parent: Any
    parent, index = node.args
    assert isinstance(index, int)
    return parent, index
