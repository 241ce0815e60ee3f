"""LAMP: magnitude relative to all that is no smaller in the same layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from narrows.ir.program import Program
from narrows.ir.structure.layers import Layer
from narrows.passes.choosing.criteria.base import DataFree
from narrows.passes.choosing.criteria.filters import filters


@dataclass(frozen=True)
class Lamp(DataFree):
    """A channel's squared norm over the sum of those that are not below it in its layer.

    The paper scores single weights, ``w_u^2 / sum over v >= u of w_v^2`` in ascending order; here a
    channel's squared norm stands for ``w^2``. The largest channel of every layer has the score 1,
    so that a choice overall leaves every layer one.
    """

    name: ClassVar[str] = "lamp"
    paper: ClassVar[str] = (
        "Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021"
    )
    comparable: ClassVar[bool] = True

    def score(self, program: Program, layer: Layer, side: str) -> Tensor:
        """Return the scores, 0 to 1."""
        squares = filters(program, layer, side).double().square().sum(1)
        order = squares.argsort(stable=True)
        ranked = squares[order]
        above = ranked.flip(0).cumsum(0).flip(0)  # of each and all that follow
        result = torch.zeros_like(squares)
        result[order] = torch.where(above > 0, ranked / above, 0)
        return result
