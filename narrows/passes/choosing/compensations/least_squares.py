"""`LeastSquares`: the weights whose result is closest to what the unpruned layer makes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from narrows.passes.choosing.compensations.base import Sums


@dataclass(frozen=True)
class LeastSquares:
    """Ridge regression toward the weights as they are (He et al., ICCV 2017, without the ridge).

    ``W = (E[y x^T] + D W) (E[x x^T] + D)^-1`` on the columns that are there, ``D`` a share of the
    mean of the diagonal, and nothing on the bias.

    Attributes:
        name: Its name.
        summary: What it does.
        reads_pruned: Whether it is told what the pruned network feeds a layer.
        ridge: The share.
    """

    name: str = "least-squares"
    summary: str = "solve for the weights that are left, from what the pruned network feeds them"
    reads_pruned: bool = True
    ridge: float = 1e-3

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


LEAST_SQUARES = LeastSquares()
SYMMETRIC = LeastSquares(
    "symmetric", "solve for the weights that are left, from what the unpruned network feeds them",
    reads_pruned=False,
)  # fmt: skip

__all__ = ["LEAST_SQUARES", "SYMMETRIC", "LeastSquares"]
