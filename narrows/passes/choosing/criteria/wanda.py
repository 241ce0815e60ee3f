"""Wanda: weights times the norms of what they multiply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from narrows.ir.program import Program
from narrows.ir.structure.layers import Layer
from narrows.passes.choosing.criteria.base import Measuring, Sums
from narrows.passes.choosing.criteria.filters import blocks
from narrows.passes.choosing.seen import Seen


@dataclass(frozen=True)
class Wanda(Measuring):
    """The sum of ``|w| * |x|`` over the weights that read a channel, or that make it.

    ``|x|`` is the 2-norm of the input channel that a weight multiplies, over the positions of an
    example, in the quadratic mean over the examples. The taps of a convolution share it.
    """

    name: ClassVar[str] = "wanda"
    paper: ClassVar[str] = (
        "Sun et al., A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024"
    )
    whole: ClassVar[bool] = True

    def measure(self, seen: Seen) -> Sums:
        """Return the sums of squares of the input channels."""
        return {"squares": seen.flat.double().square().sum((0, 2))}

    def weigh(self, program: Program, layer: Layer, side: str, sums: Sums) -> Tensor:
        """Return the sums of products."""
        weights = blocks(program, layer).double().abs().sum(3)  # [groups, outputs, inputs]
        norms = (sums["squares"] / sums["examples"]).sqrt().reshape(len(weights), 1, -1)
        return (weights * norms).sum(1 if side == "inputs" else 2).flatten()
