"""Operators that make a tensor out of sizes and numbers: zeros, ones, arange."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from narrows.ir.held import Held
from narrows.ir.labels import free, opaque
from narrows.ir.meta import Meta, shape_of
from narrows.ir.ops.args import arguments, numeric
from narrows.ir.ops.flow import Flow
from narrows.ir.ops.protocols import Builder, Channels
from narrows.ir.ops.row import Row


@dataclass(frozen=True, kw_only=True)
class Fill(Row):
    """``y`` depends on no tensor. Where its sizes are fixed, it counts as a weight.

    Attributes:
        value: The argument that says the number it is filled with; empty if it varies.
    """

    kind = "fill"
    value: str = ""

    def flow(self, facts: Channels, node: fx.Node) -> Flow:
        shape = shape_of(node)
        if not node.all_input_nodes:
            return Flow(free(shape))
        value = opaque(shape)
        if self.value:
            number = arguments(node)[self.value]
            value.const = torch.tensor([numeric(number)], dtype=Meta(node).dtype).double().numpy()
        return Flow(value)

    def rewrite(self, rewriter: Builder, node: fx.Node) -> Held:
        return rewriter.whole(node)
