"""The integer form of an operator: what becomes of it when its operands are codes on a grid.

A form answers, for a node of the float program:

* ``operands``: which operands are activations, and so have to be codes;
* ``obstacle``: why these arguments have no integer form, so that the node stays a float island;
* ``emit``: the call of ``torch.ops.narrows`` that computes the result on a given grid.

Four kinds differ in the grid of the result. A form that *computes* has a grid of its own. One
that *moves* codes without looking at them leaves them on their operand's grid, and the operator
itself runs on the codes. One that *clips* is absorbed into the clip of the operator before it. One
that *tests* them gives truth values, which have no grid.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, fx

import narrows.ir.integer.library  # noqa: F401  (defines torch.ops.narrows)
from narrows.ir.integer.grid import HALF_EVEN, Grid
from narrows.ir.meta import Meta, op_name, shape_of
from narrows.ir.ops.args import arguments

ops: Any = torch.ops.narrows
aten = torch.ops.aten

Call = tuple[Any, tuple[Any, ...]]


@dataclass(frozen=True)
class Settled:
    """Where a result settles.

    Attributes:
        grid: Its grid.
        low: The smallest code, after the clips that were absorbed.
        high: The largest one.
        rounding: How it is rounded.
    """

    grid: Grid
    low: int
    high: int
    rounding: str

    @property
    def tail(self) -> tuple[int, int, int]:
        """The arguments that every operator ends in."""
        return self.grid.zero, self.low, self.high


def listed(grid: Grid) -> list[int]:
    """Return a grid as the fake operators take it."""
    return [grid.exponent, grid.zero, grid.low, grid.high]


def spread(value: Any, count: int) -> list[int]:
    """Return one number per axis; ATen takes a single one for all."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * count if len(values) == 1 else values


def along_batch(operand: fx.Node, axes: Iterable[int]) -> str:
    """Return why no form can be made for the sizes of an operand along axes, or nothing.

    What is made for a size, be it a table, a mask or a shape, is that of the example's batch and of
    no other.
    """
    rank = len(shape_of(operand))
    free = {a % rank for a in axes}.intersection(Meta(operand).dynamic)
    return "it works along the batch, whose size is free" if free else ""


class Fold(Protocol):
    """What `IntegerForm.emit` may ask of the pass that folds."""

    def codes(self, operand: fx.Node) -> tuple[fx.Node, Grid]:
        """Return the node of an operand's codes, and their grid."""
        ...

    def layer(
        self, node: fx.Node, weights: LayerWeights, x: Grid, out: Grid
    ) -> tuple[fx.Node, fx.Node | None, list[int]]:
        """Return the nodes of a layer's int8 weight and int32 bias, and the shifts it ends in."""
        ...

    def truth(self, operand: fx.Node) -> fx.Node:
        """Return the node of an operand that holds truth values."""
        ...

    def constant(self, name: str, tensor: Tensor) -> fx.Node:
        """Return the node of a new constant."""
        ...

    def table(self, node: fx.Node, made: Tensor) -> fx.Node:
        """Return the node of a table that was made for a node's function, or of the plan's."""
        ...

    def float_weight(self, node: fx.Node | None) -> Tensor | None:
        """Return the tensor behind a ``get_attr`` node of the float program."""
        ...

    def step(
        self,
        node: fx.Node,
        target: Any,
        args: tuple[Any, ...],
        suffix: str,
        grid: Grid,
        rounding: str = HALF_EVEN,
    ) -> fx.Node:
        """Return a node on the way to a node's result; its codes lie on ``grid``."""
        ...

    def product_fits(self, node: fx.Node, length: int, a: Grid, b: Grid) -> None:
        """Raise if a sum of ``length`` products of two activations may be too large."""
        ...


@dataclass(frozen=True)
class LayerWeights:
    """The weights that a layer sums against.

    Attributes:
        weight: The argument that holds the weight.
        bias: The one that holds the bias, or ``None``.
        axis: The axis of the output channels.
        transposed: Whether the integer operator takes the weight with its two axes swapped.
        groups: Where these are several, and the axis holds the channels of one of them, all
            channels have one exponent.
    """

    weight: fx.Node
    bias: fx.Node | None
    axis: int = 0
    transposed: bool = False
    groups: int = 1


@dataclass(frozen=True)
class IntegerForm(ABC):
    """How one operator works on codes; see the module's text."""

    kind: ClassVar[str] = "computes"

    def at(self, node: fx.Node) -> IntegerForm:
        """Return the form for the node's arguments, where that depends on them."""
        return self

    def operands(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """Return the activations that the node reads."""
        return tuple(a for a in list(_arguments(node).values())[:1] if isinstance(a, fx.Node))

    def weights(self, node: fx.Node) -> LayerWeights | None:
        """Return the weights that the node sums against, if it is a layer."""
        return None

    def obstacle(self, node: fx.Node) -> str:
        """Return why the node has no integer form, or an empty string."""
        return ""

    def narrow(self, node: fx.Node) -> str:
        """Return why the node works on codes of 8 bits alone, or nothing where wide ones do."""
        return f"{op_name(node)} works on codes of 8 bits"

    def homogeneous(self, node: fx.Node) -> bool:
        """Whether a positive factor of its one operand is one of its result."""
        return False

    def fake(self, node: fx.Node, grids: list[Grid], out: Grid, rounding: str) -> Call | None:
        """Return the call that stands for the node in a fake-quantized program, if not itself."""
        return None

    @abstractmethod
    def emit(self, fold: Fold, node: fx.Node, out: Settled) -> Call:
        """Return the integer operator and its arguments."""


class Tests(IntegerForm):
    """Asks something of codes: its result are truth values, which have no grid."""

    kind = "tests"

    def narrow(self, node: fx.Node) -> str:
        return ""

    @abstractmethod
    def test(self, fold: Fold, node: fx.Node) -> Call:
        """Return the integer operator and its arguments."""

    def emit(self, fold: Fold, node: fx.Node, out: Settled) -> Call:
        raise NotImplementedError("truth values have no grid")


class AnyWidth(IntegerForm):
    """A form that takes and gives codes of up to 16 bits."""

    def narrow(self, node: fx.Node) -> str:
        return ""


def _arguments(node: fx.Node) -> dict[str, Any]:
    if hasattr(node.target, "_schema"):
        return arguments(node)
    return {str(i): a for i, a in enumerate(node.args)}  # getitem


def integer_macs(node: fx.Node) -> int:
    """Return the multiply-accumulates of an operator of `torch.ops.narrows`; 0 for any other."""
    if node.target not in (ops.conv.default, ops.conv_transpose.default, ops.linear.default,
                           ops.matmul.default):  # fmt: skip
        return 0
    x, weight = (shape_of(n) for n in node.args[:2] if isinstance(n, fx.Node))
    if node.target is ops.conv_transpose.default:  # every element of x meets weight[channel]
        return math.prod(x) * math.prod(weight[1:])
    taps = x[-1] if node.target is ops.matmul.default else math.prod(weight[1:])
    return math.prod(shape_of(node)) * taps


# ------------------------------------------------------------------ no arithmetic


@dataclass(frozen=True)
class Moves(IntegerForm):
    """The operator itself runs on the codes: it only moves them, or picks the largest."""

    kind = "moves"

    def narrow(self, node: fx.Node) -> str:
        return ""

    def homogeneous(self, node: fx.Node) -> bool:
        return True

    def regrid(self, node: fx.Node, grid: Grid) -> Grid:
        """Return the grid of the result."""
        return grid

    def move(self, fold: Fold, node: fx.Node, codes: fx.Node, grid: Grid) -> Call | None:
        """Return the call that moves the codes, if it is not the node's own."""
        return None

    def emit(self, fold: Fold, node: fx.Node, out: Settled) -> Call:
        raise NotImplementedError("codes are moved")


@dataclass(frozen=True)
class Flat(Moves):
    """``max_pool1d``, which torch has no kernel of for codes: a line is an image of one row."""

    def move(self, fold: Fold, node: fx.Node, codes: fx.Node, grid: Grid) -> Call | None:
        args = arguments(node)
        kernel = spread(args["kernel_size"], 1)
        stride = spread(args["stride"], 1) if args["stride"] else kernel
        padding, dilation = (spread(args[k], 1) for k in ("padding", "dilation"))
        image = fold.step(node, aten.unsqueeze.default, (codes, -2), "row", grid)
        how = ([1, *kernel], [1, *stride], [0, *padding], [1, *dilation], args["ceil_mode"])
        pooled = fold.step(node, aten.max_pool2d.default, (image, *how), "pooled", grid)
        return aten.squeeze.dim, (pooled, -2)


@dataclass(frozen=True)
class Relabel(Moves):
    """A product with a power of two: the same codes under another exponent."""

    power: int = 0

    def regrid(self, node: fx.Node, grid: Grid) -> Grid:
        return replace(grid, exponent=grid.exponent - self.power)


@dataclass(frozen=True)
class Clip(IntegerForm):
    """``min(max(x, lo), hi)``: absorbed into the clip before it."""

    kind = "clips"
    lo: float | str | None = None
    hi: float | str | None = None

    def bounds(self, node: fx.Node) -> tuple[float, float]:
        """Return the smallest and the largest result."""
        args = arguments(node)

        def bound(value: float | str | None, default: float) -> float:
            value = args[value] if isinstance(value, str) else value
            return default if value is None else float(value)

        return bound(self.lo, -math.inf), bound(self.hi, math.inf)

    def homogeneous(self, node: fx.Node) -> bool:
        return all(b == 0.0 or math.isinf(b) for b in self.bounds(node))

    def narrow(self, node: fx.Node) -> str:
        return ""

    def emit(self, fold: Fold, node: fx.Node, out: Settled) -> Call:
        x, grid = fold.codes(self.operands(node)[0])
        by = grid.exponent - out.grid.exponent
        return ops.rescale.default, (x, by, grid.zero, *out.tail)


__all__ = [
    "AnyWidth", "Call", "Clip", "Flat", "Fold", "IntegerForm", "LayerWeights", "Moves", "Relabel",
    "Settled", "Tests", "along_batch", "listed", "spread",
]  # fmt: skip
