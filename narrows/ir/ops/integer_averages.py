"""The integer forms of averages: exact quotients of sums of codes, rounded once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from narrows.ir.integer import windows
from narrows.ir.meta import Meta, shape_of
from narrows.ir.ops.args import arguments
from narrows.ir.ops.integer import AnyWidth, Call, Fold, IntegerForm, Settled, along_batch, spread
from narrows.ir.ops.integer_windows import resampled

ops: Any = torch.ops.narrows


@dataclass(frozen=True)
class Mean(AnyWidth):
    """An average over axes that go away, or stay with size 1.

    Attributes:
        total: Whether it is the sum.
    """

    total: bool = False

    def homogeneous(self, node: fx.Node) -> bool:
        return True

    def obstacle(self, node: fx.Node) -> str:
        own = Meta(self.operands(node)[0]).dtype
        return "it casts" if arguments(node)["dtype"] not in (None, own) else ""

    def axes(self, node: fx.Node) -> list[int]:
        """Return the axes, in order: all of them where none is named."""
        rank = len(shape_of(self.operands(node)[0]))
        return sorted(a % rank for a in arguments(node).get("dim") or range(rank))

    def emit(self, fold: Fold, node: fx.Node, out: Settled) -> Call:
        x, grid = fold.codes(self.operands(node)[0])
        by = grid.exponent - out.grid.exponent
        keeps = arguments(node).get("keepdim", False)
        call = (x, self.axes(node), keeps, by, grid.zero, *out.tail, int(self.total))
        return ops.mean.default, call


@dataclass(frozen=True)
class AveragePool(AnyWidth):
    """Average pooling over windows of one size, or adaptive.

    Attributes:
        spatial: How many trailing axes it pools over.
        adaptive: Whether the windows follow from the size of the result.
    """

    spatial: int = 2
    adaptive: bool = False

    def homogeneous(self, node: fx.Node) -> bool:
        return True

    def narrow(self, node: fx.Node) -> str:
        # Backends have kernels for wide codes over windows of one size.
        return IntegerForm.narrow(self, node) if self._uneven(node) else ""

    def obstacle(self, node: fx.Node) -> str:
        if len(shape_of(self.operands(node)[0])) != self.spatial + 2:
            return "its input has no batch axis"
        if not self.adaptive or self._whole(node):
            return ""
        return along_batch(self.operands(node)[0], range(-self.spatial, 0))

    def _kernel(self, node: fx.Node) -> list[int] | None:
        """Return the size of adaptive windows, if they all have one."""
        sizes = shape_of(self.operands(node)[0])[-self.spatial :]
        pairs = list(zip(sizes, spread(arguments(node)["output_size"], self.spatial), strict=True))
        return None if any(s % w for s, w in pairs) else [s // w for s, w in pairs]

    def _whole(self, node: fx.Node) -> bool:
        """Whether there is one adaptive window, of everything."""
        return set(shape_of(node)[-self.spatial :]) == {1}

    def _uneven(self, node: fx.Node) -> bool:
        return self.adaptive and self._kernel(node) is None

    def emit(self, fold: Fold, node: fx.Node, out: Settled) -> Call:
        args, count = arguments(node), self.spatial
        operand = self.operands(node)[0]
        x, grid = fold.codes(operand)
        rest = (grid.exponent - out.grid.exponent, grid.zero, *out.tail)
        if self._uneven(node):
            ends = zip(shape_of(operand)[2:], shape_of(node)[2:], strict=True)
            return resampled(fold, node, operand, [windows.uneven(*e) for e in ends], out)
        if self.adaptive:
            return self._adaptive(node, x, rest)
        kernel, padding = (spread(args[k], count) for k in ("kernel_size", "padding"))
        stride = spread(args["stride"], count) if args["stride"] else kernel
        how = (kernel, stride, padding, args["ceil_mode"], args["count_include_pad"])
        return ops.average_pool.default, (x, *how, *rest, args.get("divisor_override") or 0)

    def _adaptive(self, node: fx.Node, x: fx.Node, rest: tuple[Any, ...]) -> Call:
        if self._whole(node):
            return ops.mean.default, (x, list(range(2, 2 + self.spatial)), True, *rest)
        kernel, padding = self._kernel(node), [0] * self.spatial
        return ops.average_pool.default, (x, kernel, kernel, padding, False, True, *rest)


__all__ = ["AveragePool", "Mean"]
