"""APoZ: how seldom a channel is zero."""

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
class Apoz(Measuring):
    """One less the average percentage of zeros, over examples and positions.

    It is taken behind the activation: of what reads a channel in what it reads, of what makes one
    behind the norm and the activation that follow.
    """

    name: ClassVar[str] = "apoz"
    paper: ClassVar[str] = (
        "Hu et al., Network Trimming: A Data-Driven Neuron Pruning Approach, 2016"
    )

    def measure(self, seen: Seen) -> Sums:
        """Return how many numbers are zero, and how many there are."""
        x = seen.flat
        return {"zeros": (x == 0).sum((0, 2)), "count": torch.tensor(x.shape[0] * x.shape[2])}

    def weigh(self, program: Program, layer: Layer, side: str, sums: Sums) -> Tensor:
        """Return the share of numbers that are not zero, 0 to 1."""
        if not bool(sums["zeros"].any()):
            raise self.no("none of its numbers is ever zero: no ReLU made them", "mean-activation")
        return 1 - sums["zeros"] / sums["count"]
