"""The integer forms of comparisons, and of what chooses between tensors.

A truth value has no grid: it is a ``bool`` in an integer program as in any other. Whatever is
chosen lies on one grid already, that of the result, so that choosing only moves codes: rounding
keeps order, and the larger of two rounded numbers is the larger number, rounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from narrows.ir.integer.comparisons import MIRRORED, threshold
from narrows.ir.integer.grid import Grid
from narrows.ir.meta import Meta, shape_of
from narrows.ir.ops.args import arguments, is_tensor
from narrows.ir.ops.integer import (
    AnyWidth,
    Call,
    Clip,
    Fold,
    IntegerForm,
    Moves,
    Settled,
    Tests,
    along_batch,
)
from narrows.ir.ops.integer_functions import alone, number

ops: Any = torch.ops.narrows
aten = torch.ops.aten


def _floating(node: fx.Node) -> bool:
    dtype = Meta(node).dtype
    return dtype is not None and dtype.is_floating_point


# ------------------------------------------------------------------ comparisons


@dataclass(frozen=True)
class Compare(Tests):
    """A comparison of two tensors, or of one with a number.

    Attributes:
        how: One of `narrows.ir.integer.comparisons.ANSWERS`.
        fixed: The number, where the operator has no second operand.
    """

    how: str = "gt"
    fixed: float | None = None

    def operands(self, node: fx.Node) -> tuple[fx.Node, ...]:
        return tuple(a for a in self._sides(node) if is_tensor(a) and not alone(a))

    def _sides(self, node: fx.Node) -> list[Any]:
        return list(arguments(node).values())[: 2 if self.fixed is None else 1]

    def obstacle(self, node: fx.Node) -> str:
        if not all(map(_floating, self.operands(node))):
            return "it compares codes with whole numbers"
        other = [a for a in self._sides(node) if not is_tensor(a)]
        return "it compares with NaN" if any(math.isnan(number(a)) for a in other) else ""

    def test(self, fold: Fold, node: fx.Node) -> Call:
        read = self.operands(node)
        coded = [fold.codes(n) for n in read]
        if len(read) == 2:
            (a, a_grid), (b, b_grid) = coded
            fine = max(a_grid.exponent, b_grid.exponent)
            shifts = fine - a_grid.exponent, fine - b_grid.exponent
            return ops.compare.default, (a, b, self.how, *shifts, a_grid.zero, b_grid.zero)
        how, against = self.how, self.fixed
        if against is None:
            sides = self._sides(node)
            how = how if sides[0] is read[0] else MIRRORED[how]
            against = _value(fold, next(a for a in sides if a is not read[0])).item()
        x, grid = coded[0]
        return ops.compare_number.default, (x, how, threshold(against, grid, how))


def _value(fold: Fold, value: Any) -> Tensor:
    """Return a number, or a weight that is one, in float64."""
    weight = fold.float_weight(value) if is_tensor(value) else None
    return torch.tensor(float(number(value))).double() if weight is None else weight.double()


# ------------------------------------------------------------------ choices


class Chosen(AnyWidth):
    """A form whose operands come to lie on the grid of the result first."""

    def parts(self, node: fx.Node) -> list[Any]:
        """Return what is chosen from: tensors and numbers."""
        raise NotImplementedError

    def operands(self, node: fx.Node) -> tuple[fx.Node, ...]:
        return tuple(p for p in self.parts(node) if is_tensor(p) and not alone(p))

    def obstacle(self, node: fx.Node) -> str:
        whole = [p.name for p in self.operands(node) if not _floating(p)]
        return f"{whole[0]} holds whole numbers that are no codes" if whole else ""


def settled(fold: Fold, node: fx.Node, part: Any, out: Settled, suffix: str) -> fx.Node:
    """Return the node of a part's codes on the grid of a result, after its clip."""
    if not is_tensor(part) or alone(part):
        value, grid = _value(fold, part), out.grid
        codes = ops.quantize.default(
            value, grid.exponent, grid.zero, out.low, out.high, out.rounding, grid.wide
        )
        return fold.constant(f"{node.name}.{suffix}", codes)
    x, grid = fold.codes(part)
    alike = (grid.exponent, grid.zero, grid.wide) == (
        out.grid.exponent, out.grid.zero, out.grid.wide,
    )  # fmt: skip
    if alike and grid.low >= out.low and grid.high <= out.high:
        return x
    call = (x, grid.exponent - out.grid.exponent, grid.zero, *out.tail)
    made = fold.step(node, ops.rescale.default, call, suffix, out.grid, rounding=out.rounding)
    Meta(made).dynamic = Meta(x).dynamic  # it broadcasts: its axes are not those of the result
    return made


@dataclass(frozen=True)
class Where(Chosen):
    """One of two, by a truth value.

    Attributes:
        condition: The argument that holds the truth values.
        first: The one that holds what is taken where they are true.
        second: The one for where they are not.
    """

    condition: str = "condition"
    first: str = "self"
    second: str = "other"

    def parts(self, node: fx.Node) -> list[Any]:
        args = arguments(node)
        return [args[self.first], args[self.second]]

    def obstacle(self, node: fx.Node) -> str:
        condition = arguments(node)[self.condition]
        if Meta(condition).dtype is not torch.bool:
            return "its condition is a number"
        return super().obstacle(node)

    def emit(self, fold: Fold, node: fx.Node, out: Settled) -> Call:
        condition = fold.truth(arguments(node)[self.condition])
        names = (self.first, self.second)
        each = [
            settled(fold, node, part, out, name)
            for part, name in zip(self.parts(node), names, strict=True)
        ]
        return aten.where.self, (condition, *each)


@dataclass(frozen=True)
class Extreme(Chosen):
    """The larger or the smaller of two, or of one and bounds that are tensors.

    Attributes:
        against: The arguments that the first one is compared with, each with the operator.
    """

    against: tuple[tuple[str, Any], ...] = ()

    def parts(self, node: fx.Node) -> list[Any]:
        args = arguments(node)
        others = [args[name] for name, _ in self.against]
        return [next(iter(args.values())), *(o for o in others if o is not None)]

    def emit(self, fold: Fold, node: fx.Node, out: Settled) -> Call:
        args = arguments(node)
        made = settled(fold, node, self.parts(node)[0], out, "first")
        given = [(name, op) for name, op in self.against if args[name] is not None]
        for i, (name, op) in enumerate(given):
            call = op, (made, settled(fold, node, args[name], out, name))
            if i == len(given) - 1:
                return call
            made = fold.step(node, *call, f"by_{name}", out.grid)
        return aten.alias.default, (made,)


@dataclass(frozen=True)
class Triangle(Moves):
    """Zeros beside a diagonal: the code of zero where a mask of positions says so."""

    def obstacle(self, node: fx.Node) -> str:
        return along_batch(self.operands(node)[0], (-2, -1))

    def move(self, fold: Fold, node: fx.Node, codes: fx.Node, grid: Grid) -> Call | None:
        args, sizes = arguments(node), shape_of(node)[-2:]
        kept = node.target(torch.ones(sizes), args["diagonal"]).bool()  # type: ignore[operator]
        zero = torch.tensor(grid.zero, dtype=torch.int16 if grid.wide else torch.uint8)
        mask = fold.constant(f"{node.name}.mask", kept)
        return aten.where.self, (mask, codes, fold.constant(f"{node.name}.zero", zero))


@dataclass(frozen=True)
class Constant(Clip):
    """One number in the shape of a tensor: that tensor, clipped to it."""

    def obstacle(self, node: fx.Node) -> str:
        return "" if _floating(self.operands(node)[0]) else "it has the shape of whole numbers"


# ------------------------------------------------------------------ casts


@dataclass(frozen=True)
class Flags(AnyWidth):
    """Truth values as numbers: the codes of 1 and 0."""

    def operands(self, node: fx.Node) -> tuple[fx.Node, ...]:
        return ()

    def emit(self, fold: Fold, node: fx.Node, out: Settled) -> Call:
        return flags(fold, node, node.all_input_nodes[0], out)


def flags(fold: Fold, node: fx.Node, truth: fx.Node, out: Settled) -> Call:
    """Return the call that makes codes of truth values."""
    one, none = (settled(fold, node, float(n), out, f"code{n}") for n in (1, 0))
    return aten.where.self, (fold.truth(truth), one, none)


@dataclass(frozen=True)
class Same(Moves):
    """A cast of floating-point numbers, or NaN replaced: codes have none, and stay as they are."""

    def obstacle(self, node: fx.Node) -> str:
        operand = self.operands(node)[0]
        if not _floating(operand):
            return "it makes numbers of whole ones"
        dtype = Meta(node).dtype
        keeps = _floating(node) and dtype.itemsize >= 4
        return "" if keeps else f"it rounds to {dtype}"

    def move(self, fold: Fold, node: fx.Node, codes: fx.Node, grid: Grid) -> Call | None:
        return aten.alias.default, (codes,)


@dataclass(frozen=True)
class Cast(IntegerForm):
    """A cast, by what it makes of what."""

    def at(self, node: fx.Node) -> IntegerForm:
        operand = node.all_input_nodes[0]
        if Meta(operand).dtype is torch.bool:
            return Flags()
        return Compare("ne", 0.0) if Meta(node).dtype is torch.bool else Same()

    def emit(self, fold: Fold, node: fx.Node, out: Settled) -> Call:
        raise NotImplementedError("`at` says what it is")


__all__ = [
    "Cast", "Compare", "Constant", "Extreme", "Flags", "Same", "Triangle", "Where", "flags",
]  # fmt: skip
