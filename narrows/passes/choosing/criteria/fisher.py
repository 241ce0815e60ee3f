"""Fisher: what a channel's weights are worth by the diagonal of the Fisher matrix."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from narrows.ir.program import Program
from narrows.ir.structure.layers import Layer
from narrows.passes.choosing.criteria.base import GRADIENTS, Measuring, Sums
from narrows.passes.choosing.seen import Seen


@dataclass(frozen=True)
class Fisher(Measuring):
    """Half the sum of ``w^2 * mean((dL/dw)^2)`` over the weights of a channel.

    The mean is over the examples, each with a gradient of its own. Unlike ``gauss-newton`` it takes
    the weights as unrelated.
    """

    name: ClassVar[str] = "fisher"
    paper: ClassVar[str] = (
        "LeCun et al., Optimal Brain Damage, NIPS 1990, by the Fisher diagonal (Theis et al., 2018)"
    )
    data: ClassVar[str] = GRADIENTS
    comparable: ClassVar[bool] = True
    whole: ClassVar[bool] = True

    def measure(self, seen: Seen) -> Sums:
        """Return the sums of squared gradients, laid out as the layer's weight."""
        sight = seen.sight
        x, weight, made = sight.x, sight.weight, sight.result
        if x is None or weight is None or made is None or made.grad is None:
            raise self.no("no gradient reaches its weight")
        weight = weight.detach().requires_grad_()
        total = torch.zeros_like(weight, dtype=torch.float64)
        for own, grad in seen.apart(x.detach(), made.grad):
            with torch.enable_grad():
                result = sight.apply(own, weight)
            (found,) = torch.autograd.grad(result, weight, grad)
            total += found.double().square()
        return {"squares": total}

    def weigh(self, program: Program, layer: Layer, side: str, sums: Sums) -> Tensor:
        """Return the sums over each channel's weights."""
        c = layer.contraction
        assert c is not None
        mean = sums["squares"] / (2 * sums["examples"])
        worth = dataclasses.replace(c, data=mean * c.data.detach().double().square()).blocks
        return worth.sum((1, 3) if side == "inputs" else (2, 3)).flatten()
