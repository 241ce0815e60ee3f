"""The integer forms of resizing, and of average pooling over windows that differ in size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from narrows.ir.integer import windows
from narrows.ir.integer.grid import Grid
from narrows.ir.meta import shape_of
from narrows.ir.ops.args import arguments
from narrows.ir.ops.integer import Call, Fold, IntegerForm, Settled, along_batch

ops: Any = torch.ops.narrows

# ATen's names of the scales, by how many axes are resized.
SCALES = {1: ("scales",), 2: ("scales_h", "scales_w"), 3: ("scales_d", "scales_h", "scales_w")}


def resampled(
    fold: Fold, node: fx.Node, operand: fx.Node, made: list[tuple[Any, Any]], out: Settled
) -> Call:
    """Return the call that averages by places and weights, a pair of them per trailing axis."""
    x, grid = fold.codes(operand)
    places, weights = (
        [fold.constant(f"{node.name}.{what}{i}", pair[j]) for i, pair in enumerate(made)]
        for j, what in enumerate(("places", "weights"))
    )
    by = grid.exponent - out.grid.exponent
    return ops.resample.default, (x, places, weights, by, grid.zero, *out.tail)


@dataclass(frozen=True)
class Resize(IntegerForm):
    """Resizing over the trailing axes; weights are whole steps of a power of two.

    Attributes:
        spatial: How many axes there are.
        method: ``linear``, ``cubic``, ``smooth`` or ``nearest``, as `windows.resizing` takes it.
    """

    spatial: int = 2
    method: str = "linear"

    def homogeneous(self, node: fx.Node) -> bool:
        return True

    def obstacle(self, node: fx.Node) -> str:
        return along_batch(self.operands(node)[0], range(-self.spatial, 0))

    def fake(self, node: fx.Node, grids: list[Grid], out: Grid, rounding: str) -> Call | None:
        args = arguments(node)
        scales = args.get("scale_factors")
        if "scale_factors" not in args:
            scales = [args[name] for name in SCALES[self.spatial]]
        scales = [float(s or 0) for s in scales or [0] * self.spatial]
        sizes = list(shape_of(node)[-self.spatial :])
        corners = bool(args.get("align_corners", False))
        return ops.fake_resize.default, (
            self.operands(node)[0], self.method, sizes, scales, corners,
        )  # fmt: skip

    def emit(self, fold: Fold, node: fx.Node, out: Settled) -> Call:
        args = arguments(node)
        count = len(args["size"])
        ends = zip(shape_of(args["x"])[-count:], args["size"], args["scales"], strict=True)
        made = [windows.resizing(args["kind"], *e, args["align_corners"], count) for e in ends]
        return resampled(fold, node, args["x"], made, out)


__all__ = ["Resize", "resampled"]
