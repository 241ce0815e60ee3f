"""The integer forms of functions of one number: a table with a code for each of the operand's.

A function that is not defined everywhere is taken where it is (`Lookup.domain`), so that every
code has a result; see `narrows.ir.integer.functions.fake_function`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import narrows.ir.integer.functions  # noqa: F401  (defines fake_function)
from narrows.ir.integer.grid import Grid
from narrows.ir.integer.slopes import slope_codes
from narrows.ir.meta import Meta, op_name, shape_of
from narrows.ir.ops.args import arguments, is_tensor
from narrows.ir.ops.integer import AnyWidth, Call, Fold, IntegerForm, Settled

ops: Any = torch.ops.narrows

# Where a function may turn out to be undefined: numbers of both signs, whole and not, and none.
TRIED = (-2.5, -1.0, 0.0, 0.5, 1.0, 3.0)


@dataclass(frozen=True)
class Lookup(AnyWidth):
    """Any function of one number: a table with a code for each of the operand's, made in float64.

    Attributes:
        function: Its name, where backends have an operator for it.
        scales: Whether a positive factor passes through it.
        domain: Where it is defined, for one that has an end or a pole; what lies beyond counts as
            the end.
    """

    function: str = ""
    scales: bool = False
    domain: tuple[float, float] | None = None

    def homogeneous(self, node: fx.Node) -> bool:
        return self.scales

    def operands(self, node: fx.Node) -> tuple[fx.Node, ...]:
        read = [n for n in arguments(node).values() if is_tensor(n) and not alone(n)]
        return tuple(read[:1])

    def obstacle(self, node: fx.Node) -> str:
        for other in node.all_input_nodes:
            if is_tensor(other) and other not in self.operands(node) and not alone(other):
                return f"it also reads {other.name}"
        if len(list(filter(is_tensor, node.all_input_nodes))) != 1:
            return ""
        operand = self.operands(node)[0]
        low, high = self.domain or (-math.inf, math.inf)
        tried = torch.tensor(TRIED, dtype=torch.float64).clamp(low, high)
        made = self._made(node, {k: tried if v is operand else number(v)
                                 for k, v in arguments(node).items()})  # fmt: skip
        undefined = tried[made.isnan()].tolist()
        return f"it is undefined for {undefined[0]:g}" if undefined else ""

    def fake(self, node: fx.Node, grids: list[Grid], out: Grid, rounding: str) -> Call | None:
        if self.domain is None:
            return None
        operand, *others = arguments(node).values()
        numbers = [float(number(v)) for v in others if v is not None]
        return ops.fake_function.default, (operand, op_name(node), *self.domain, numbers)

    def emit(self, fold: Fold, node: fx.Node, out: Settled) -> Call:
        operand = self.operands(node)[0]
        x, grid = fold.codes(operand)
        first, codes = (grid.low, len(grid.codes)) if grid.wide else (0, 256)
        values = (torch.arange(codes, dtype=torch.float64) + (first - grid.zero)) * grid.scale
        args = arguments(node)
        given = {k: values if v is operand else self._other(fold, v) for k, v in args.items()}
        made = self._made(node, given)
        grid_args = (out.grid.exponent, out.grid.zero, out.low, out.high, out.rounding)
        table = ops.quantize.default(made, *grid_args, out.grid.wide)
        place = (first,) if first else ()
        return ops.lookup.default, (x, fold.table(node, table), self._function(args), *place)

    @staticmethod
    def _made(node: fx.Node, given: dict[str, Any]) -> Tensor:
        """Return what the operator makes of arguments by name."""
        keyword = {a.name for a in node.target._schema.arguments if a.kwarg_only}  # type: ignore
        with torch.no_grad():
            return node.target(  # type: ignore[operator]
                *(v for k, v in given.items() if k not in keyword),
                **{k: v for k, v in given.items() if k in keyword},
            )

    def _other(self, fold: Fold, value: Any) -> Any:
        """Return another argument: a number, or a weight that is one."""
        if not is_tensor(value):
            return number(value)
        weight = fold.float_weight(value)
        return None if weight is None else weight.detach().double()

    def _function(self, args: dict[str, Any]) -> str:
        """Return the name of a function without parameters, by which backends may know it."""
        plain = args.get("approximate", "none") == "none" and len(args) <= 2
        return self.function if plain else ""


@dataclass(frozen=True)
class Power(Lookup):
    """``x ** c``: defined for what is negative where ``c`` is a whole number."""

    def at(self, node: fx.Node) -> IntegerForm:
        exponent = arguments(node)["exponent"]
        if is_tensor(exponent):
            return self
        if not float(number(exponent)).is_integer():
            return Lookup(domain=(0.0, math.inf))
        return Lookup(domain=None if number(exponent) >= 0 else (-math.inf, math.inf))


def alone(node: fx.Node) -> bool:
    """Whether a node is a weight of one number."""
    return node.op == "get_attr" and math.prod(shape_of(node)) == 1


@dataclass(frozen=True)
class Slope(IntegerForm):
    """``prelu``: a table where there is one slope, else a product with that of the channel."""

    def at(self, node: fx.Node) -> IntegerForm:
        return Lookup(scales=True) if alone(arguments(node)["weight"]) else self

    def homogeneous(self, node: fx.Node) -> bool:
        return True

    def obstacle(self, node: fx.Node) -> str:
        weight = arguments(node)["weight"]
        return "" if weight.op == "get_attr" else f"its slopes are computed, by {weight.name}"

    def fake(self, node: fx.Node, grids: list[Grid], out: Grid, rounding: str) -> Call | None:
        return ops.fake_prelu.default, tuple(arguments(node).values())

    def emit(self, fold: Fold, node: fx.Node, out: Settled) -> Call:
        args = arguments(node)
        x, grid = fold.codes(args["x"])
        weight = fold.float_weight(args["weight"])
        assert weight is not None
        codes, unit = slope_codes(weight, len(shape_of(node)))
        by = grid.exponent + unit - out.grid.exponent
        slopes = fold.constant(f"{node.name}.slopes", codes)
        return ops.prelu.default, (x, slopes, unit, by, grid.zero, *out.tail)


def number(value: Any) -> Any:
    """Return a number, at its value in the example where the program computes it."""
    return Meta(value).size if isinstance(value, fx.Node) else value


__all__ = ["Lookup", "Power", "Slope", "alone", "number"]
