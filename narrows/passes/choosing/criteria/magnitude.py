"""Magnitude: the weights that make a channel, or that read it, small or large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from narrows.ir.program import Program
from narrows.ir.structure.layers import Layer
from narrows.passes.choosing.criteria.base import DataFree
from narrows.passes.choosing.criteria.filters import blocks


class Magnitude(DataFree):
    """The sum of ``|w| ** power`` over the weights that read a channel, or that make it."""

    power: ClassVar[int]

    def score(self, program: Program, layer: Layer, side: str) -> Tensor:
        """Return the magnitudes; biases and norms do not count."""
        over = (1, 3) if side == "inputs" else (2, 3)
        weights = blocks(program, layer)
        norm = torch.linalg.vector_norm(weights, self.power, over, dtype=torch.float64)
        return norm.flatten().pow(self.power)


@dataclass(frozen=True)
class L1(Magnitude):
    """The sum of the weights' magnitudes."""

    name: ClassVar[str] = "l1"
    paper: ClassVar[str] = "Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017"
    power: ClassVar[int] = 1


@dataclass(frozen=True)
class L2(Magnitude):
    """The sum of the weights' squares."""

    name: ClassVar[str] = "l2"
    paper: ClassVar[str] = "He et al., Soft Filter Pruning, IJCAI 2018"
    power: ClassVar[int] = 2
