"""The integer forms of quotients of two activations, and of vector norms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from narrows.ir.integer.grid import Grid
from narrows.ir.integer.quotients import LARGEST_SQUARES, ORDERS
from narrows.ir.meta import Meta, shape_of
from narrows.ir.ops.args import arguments, is_tensor
from narrows.ir.ops.integer import AnyWidth, Call, Fold, IntegerForm, Settled

ops: Any = torch.ops.narrows

WIDE_REACH = 2**15  # of a code of 16 bits


@dataclass(frozen=True)
class Div(AnyWidth):
    """``a / b`` of two tensors: the exact quotient, rounded once."""

    def operands(self, node: fx.Node) -> tuple[fx.Node, ...]:
        return tuple(a for a in list(arguments(node).values())[:2] if is_tensor(a))

    def fake(self, node: fx.Node, grids: list[Grid], out: Grid, rounding: str) -> Call | None:
        return ops.fake_div.default, self.operands(node)

    def emit(self, fold: Fold, node: fx.Node, out: Settled) -> Call:
        (a, a_grid), (b, b_grid) = (fold.codes(n) for n in self.operands(node))
        by = a_grid.exponent - b_grid.exponent - out.grid.exponent
        return ops.div.default, (a, b, by, a_grid.zero, b_grid.zero, *out.tail)


@dataclass(frozen=True)
class VectorNorm(AnyWidth):
    """A norm over axes, of order 1, 2 or infinity.

    Attributes:
        order: The name of the argument that says which.
    """

    order: str = "ord"

    def homogeneous(self, node: fx.Node) -> bool:
        return True

    def narrow(self, node: fx.Node) -> str:
        count = math.prod(shape_of(self.operands(node)[0])[a] for a in self._axes(node))
        few = count * WIDE_REACH**2 < LARGEST_SQUARES
        return "" if few else f"{IntegerForm.narrow(self, node)} where it sums {count:,} squares"

    def obstacle(self, node: fx.Node) -> str:
        args = arguments(node)
        if self._order(node) not in ORDERS:
            return f"a norm of order {args[self.order]} has no integer form"
        own = Meta(self.operands(node)[0]).dtype
        return "it casts" if args.get("dtype") not in (None, own) else ""

    def _order(self, node: fx.Node) -> float:
        given = arguments(node)[self.order]
        return 2.0 if given is None else float(given)

    def _axes(self, node: fx.Node) -> list[int]:
        rank = len(shape_of(self.operands(node)[0]))
        return sorted(a % rank for a in arguments(node)["dim"] or range(rank))

    def emit(self, fold: Fold, node: fx.Node, out: Settled) -> Call:
        x, grid = fold.codes(self.operands(node)[0])
        by = grid.exponent - out.grid.exponent
        call = (x, self._order(node), self._axes(node), arguments(node)["keepdim"], by, grid.zero)
        return ops.vector_norm.default, (*call, *out.tail)


__all__ = ["Div", "VectorNorm"]
