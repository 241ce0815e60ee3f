"""Activity: how large a channel's numbers are, and how much they change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from narrows.ir.program import Program
from narrows.ir.structure.layers import Layer
from narrows.passes.choosing.criteria.base import Measuring, Sums
from narrows.passes.choosing.seen import Seen


@dataclass(frozen=True)
class MeanActivation(Measuring):
    """The mean magnitude of a channel's numbers over examples and positions."""

    name: ClassVar[str] = "mean-activation"
    paper: ClassVar[str] = (
        "Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference, "
        "ICLR 2017"
    )

    def measure(self, seen: Seen) -> Sums:
        """Return the sums of magnitudes, and how many numbers a channel has."""
        x = seen.flat.double()
        return {"sum": x.abs().sum((0, 2)), "count": torch.tensor(x.shape[0] * x.shape[2])}

    def weigh(self, program: Program, layer: Layer, side: str, sums: Sums) -> Tensor:
        """Return the means."""
        return sums["sum"] / sums["count"]


@dataclass(frozen=True)
class Variance(Measuring):
    """The variance of a channel's numbers over examples and positions.

    A channel that hardly changes can be replaced by a constant.
    """

    name: ClassVar[str] = "variance"
    paper: ClassVar[str] = (
        "Polyak and Wolf, Channel-Level Acceleration of Deep Face Representations, IEEE Access 2015"
    )

    def measure(self, seen: Seen) -> Sums:
        """Return the sums of the numbers and of their squares, and how many a channel has."""
        x = seen.flat.double()
        count = torch.tensor(x.shape[0] * x.shape[2])
        return {"sum": x.sum((0, 2)), "squares": x.square().sum((0, 2)), "count": count}

    def weigh(self, program: Program, layer: Layer, side: str, sums: Sums) -> Tensor:
        """Return the variances."""
        mean = sums["sum"] / sums["count"]
        return (sums["squares"] / sums["count"] - mean.square()).clamp(min=0)
