"""`LeastSquares`: the weights whose result is closest to what the unpruned layer makes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from narrows.errors import PlanUsageError
from narrows.passes.choosing.compensations.base import Sums
from narrows.passes.plans.within import refuse_no_whole


@dataclass(frozen=True)
class LeastSquares:
    """Solve for the weights that are left, from what the pruned network feeds them.

    Ridge regression toward the weights as they are (the paper has no ridge):
    ``W = (E[y x^T] + D W) (E[x x^T] + D)^-1`` on the columns that are there, ``D`` a share of the
    mean of the diagonal, and nothing on the bias.

    Attributes:
        ridge: The share.
        turns: How often it is solved again where a clip follows, for what comes out of the clip.
    """

    name: ClassVar[str] = "least-squares"
    paper: ClassVar[str] = (
        "He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017"
    )
    reads_pruned: ClassVar[bool] = True
    ridge: float = 1e-3
    turns: int = 3

    def __post_init__(self) -> None:
        refuse_no_whole(f"turns of {self.name}", self.turns)
        if not 0 < self.ridge < math.inf:
            raise PlanUsageError(
                f"{self.name} takes a finite ridge above 0, got {self.ridge!r}",
                why="without one, weights of channels that move together need not be unique",
            )

    def solve(self, sums: Sums) -> Tensor:
        """Return the regression's weights."""
        mean = sums.square.diagonal(dim1=1, dim2=2)[:, :-1]
        own = sums.kept[:, :-1]
        level = (mean * own).sum(1, keepdim=True) / own.sum(1, keepdim=True).clamp(min=1)
        weights = (self.ridge * level + (level == 0)).expand_as(mean)
        ridge = torch.cat([weights, torch.full_like(level, 1e-12)], 1)
        both = sums.kept[:, :, None] & sums.kept[:, None, :]
        left = sums.square * both + torch.diag_embed(torch.where(sums.kept, ridge, 1.0))
        right = (sums.cross + ridge[:, None] * sums.now) * sums.kept[:, None]
        return torch.linalg.solve(left, right.mT).mT * sums.kept[:, None]


@dataclass(frozen=True)
class Symmetric(LeastSquares):
    """Solve for the weights that are left, from what the unpruned network feeds them.

    Attributes:
        ridge, turns: As for `LeastSquares`.
    """

    name: ClassVar[str] = "symmetric"
    reads_pruned: ClassVar[bool] = False


LEAST_SQUARES = LeastSquares()
QUICK = LeastSquares(turns=0)  # while a search is on its way

__all__ = ["LEAST_SQUARES", "QUICK", "LeastSquares", "Symmetric"]
