"""OBC: the error of a layer's result where a channel goes and the other weights make up for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from narrows.errors import PlanUsageError
from narrows.ir.program import Program
from narrows.ir.structure.layers import Layer
from narrows.passes.choosing.criteria.base import Measuring, Sums
from narrows.passes.choosing.criteria.filters import blocks
from narrows.passes.choosing.products import Product, gram
from narrows.passes.choosing.seen import Seen
from narrows.passes.choosing.surgeon import DAMPING, inverted, losses

POSITIONS = 256  # of an example, at most: neighbours say nearly the same


class Reading(Measuring):
    """A criterion by the second moments of what a layer multiplies with its weights."""

    sides: ClassVar[tuple[str, ...]] = ("inputs",)

    def measure(self, seen: Seen) -> Sums:
        """Return the Gram matrix of the columns, per group, and how many rows it sums over."""
        product, x, y = Product.of(seen.layer), seen.sight.x, seen.sight.result
        if product is None or x is None or y is None:
            raise self.no("it is no convolution or linear layer")
        rows = product.patches(x.detach(), product.drawn(y, POSITIONS))
        return {"gram": gram(rows), "rows": torch.tensor(rows.shape[2])}


@dataclass(frozen=True)
class Obc(Reading):
    """The optimal brain surgeon on blocks: ``1/2 sum_o w [(H^-1)_cc]^-1 w^T`` over the outputs.

    ``w`` are an output's weights of channel ``c``, one a tap, and ``H`` is the mean of ``x x^T``
    over what the layer multiplies, damped. It is half the squared error that is left in the layer's
    result, mean over examples and positions, when its other weights change as best they can.

    Attributes:
        damping: What is added to the diagonal of ``H``, relative to its mean.
    """

    name: ClassVar[str] = "obc"
    paper: ClassVar[str] = "Frantar and Alistarh, Optimal Brain Compression, NeurIPS 2022"
    damping: float = DAMPING

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise PlanUsageError(
                f"obc takes a damping above 0, got {self.damping!r}",
                why="a channel that is a sum of others has no inverse without it",
            )

    def weigh(self, program: Program, layer: Layer, side: str, sums: Sums) -> Tensor:
        """Return the errors; a layer that reads nothing but zeros has zeros."""
        weights = blocks(program, layer).double()  # [groups, outputs, inputs, taps]
        _, outputs, inputs, taps = weights.shape
        where, each = torch.arange(inputs * taps).reshape(inputs, taps), weights.new_ones(outputs)
        mean = sums["gram"] / sums["rows"]
        parts = zip(weights.flatten(2), inverted(mean, self.damping), strict=True)
        found = torch.stack([losses(matrix, inverse, where, each) for matrix, inverse in parts])
        return (found * mean.diagonal(dim1=1, dim2=2).any(1, keepdim=True)).flatten()
