"""The integer forms of padding, and of what picks elements by their places along an axis.

A border of one number is a border of its code. One that repeats or mirrors elements only moves
codes, and torch has no kernels of it for them; so the operator runs on the *places* along each
axis, and codes are taken from there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from narrows.ir.integer.grid import HALF_EVEN, Grid
from narrows.ir.meta import Meta, shape_of
from narrows.ir.ops.args import arguments, computes_numbers
from narrows.ir.ops.integer import Call, Fold, IntegerForm, Moves, along_batch

aten = torch.ops.aten


@dataclass(frozen=True)
class Padding(Moves):
    """Pads with a number: its code goes around the codes."""

    def at(self, node: fx.Node) -> IntegerForm:
        return self if arguments(node).get("mode", "constant") == "constant" else Border()

    def obstacle(self, node: fx.Node) -> str:
        return "how much it pads is computed when it runs" if computes_numbers(node) else ""

    def homogeneous(self, node: fx.Node) -> bool:
        return self.value(node) == 0.0  # any other number stays what it is

    def value(self, node: fx.Node) -> float:
        """Return the number that it pads with."""
        return float(arguments(node)["value"] or 0.0)

    def saturates(self, node: fx.Node, grid: Grid) -> bool:
        """Whether the number lies beyond the ends of a grid, by more than rounding."""
        steps = self.value(node) * 2.0**grid.exponent + grid.zero
        return not grid.low - 0.5 <= steps <= grid.high + 0.5

    def fake(self, node: fx.Node, grids: list[Grid], out: Grid, rounding: str) -> Call | None:
        grid = grids[0]
        code = grid.code(self.value(node), rounding)
        if code == grid.zero:
            return None
        changes = {"value": (code - grid.zero) * grid.scale}
        return node.target, tuple({**arguments(node), **changes}.values())

    def move(self, fold: Fold, node: fx.Node, codes: fx.Node, grid: Grid) -> Call | None:
        args = arguments(node)
        mode = (args["mode"],) if "mode" in args else ()
        return node.target, (codes, args["pad"], *mode, grid.code(self.value(node), HALF_EVEN))


@dataclass(frozen=True)
class Border(Moves):
    """Repeats or mirrors elements around an image, a line or a volume."""

    def obstacle(self, node: fx.Node) -> str:
        if computes_numbers(node):
            return "how much it pads is computed when it runs"
        return along_batch(self.operands(node)[0], self.axes(node))

    def axes(self, node: fx.Node) -> list[int]:
        """Return the axes that grow or shrink, in order."""
        args = arguments(node)
        given = args["pad"] if "pad" in args else args["padding"]
        rank = len(shape_of(node))
        pairs = [given[i : i + 2] for i in range(0, len(given), 2)]
        return sorted(rank - 1 - i for i, pair in enumerate(pairs) if any(pair))

    def move(self, fold: Fold, node: fx.Node, codes: fx.Node, grid: Grid) -> Call | None:
        return picked(fold, node, codes, grid, self.axes(node))


@dataclass(frozen=True)
class Nearest(Moves):
    """Resizing to the nearest element; torch has no kernel of it for codes of 16 bits."""

    def obstacle(self, node: fx.Node) -> str:
        return along_batch(self.operands(node)[0], range(2, len(shape_of(node))))

    def move(self, fold: Fold, node: fx.Node, codes: fx.Node, grid: Grid) -> Call | None:
        return picked(fold, node, codes, grid, range(2, len(shape_of(node)))) if grid.wide else None


def picked(
    fold: Fold, node: fx.Node, codes: fx.Node, grid: Grid, axes: Iterable[int]
) -> Call:  # fmt: skip
    """Return the call that takes codes from the places that an operator takes its elements from.

    Args:
        fold: The pass.
        node: The operator: what it does along an axis does not depend on the others.
        codes: What it works on.
        grid: Their grid.
        axes: Along which axes it takes any.
    """
    call: Call = (aten.alias.default, (codes,))
    for axis in axes:
        index = fold.constant(f"{node.name}.places{axis}", places(node, axis))
        if call[0] is not aten.alias.default:
            codes = fold.step(node, *call, f"to{axis}", grid)
        call = (aten.index_select.default, (codes, axis, index))
    return call


def places(node: fx.Node, axis: int) -> torch.Tensor:
    """Return which index of its operand each index of a result comes from, along an axis."""
    operand = node.all_input_nodes[0]
    sizes, rank = shape_of(operand), len(shape_of(operand))
    line = torch.arange(sizes[axis], dtype=torch.float64)
    line = line.reshape([-1 if a == axis else 1 for a in range(rank)]).expand(sizes)

    def value(n: fx.Node) -> Any:
        return line if n is operand else Meta(n).size

    args, kwargs = map_arg((node.args, node.kwargs), value)
    with torch.no_grad():
        made = node.target(*args, **kwargs)  # type: ignore[operator]
    return made.movedim(axis, 0).reshape(made.shape[axis], -1)[:, 0].long()


__all__ = ["Border", "Nearest", "Padding", "picked", "places"]
